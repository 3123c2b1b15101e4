# SPDX-License-Identifier: Apache-2.0
"""`submit`, `stream` and `close` on every target: order, callbacks, and nothing that is lost."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes import Runtime, load
from perceiver_export.runtimes.errors import InputError, RuntimeClosedError, UsageError
from tests.runtimes.callbacks import in_callback


@pytest.fixture(scope="module")
def runtime(target: str, fashion_bundle: Path) -> Iterator[Runtime]:
    """Where an engine was compiled makes no difference here."""
    with load(fashion_bundle, target, verify="never") as loaded:
        yield loaded


def test_more_futures_than_run_at_once_have_their_own_answers(runtime: Runtime, golden: dict[str, Any]) -> None:
    images = [golden["image"] * scale for scale in range(1, 21)]
    futures = [runtime.submit({"image": image}) for image in images]

    for image, future in zip(images, futures, strict=True):
        np.testing.assert_array_equal(runtime.run({"image": image})["logits"], future.result(timeout=60)["logits"])
    with pytest.raises(InputError):
        runtime.submit({}).result(timeout=60)


def test_one_thread_can_be_submitted_to_as_well_and_beside_another_runtime(
    runtime: Runtime, target: str, fashion_bundle: Path, golden: dict[str, Any]
) -> None:
    with load(fashion_bundle, target, threads=1) as alone:
        expected = alone.run({"image": golden["image"]})["logits"]
        np.testing.assert_allclose(runtime.run({"image": golden["image"]})["logits"], expected, atol=1e-5)
        for outputs in alone.stream([{"image": golden["image"]}] * 4):
            np.testing.assert_array_equal(expected, outputs["logits"])


def test_a_stream_keeps_the_order_and_reads_no_further_ahead_than_it_may(
    runtime: Runtime, golden: dict[str, Any]
) -> None:
    read = 0

    def frames() -> Iterator[dict[str, Any]]:
        nonlocal read
        for scale in range(1, 11):
            read = scale
            yield {"image": golden["image"] * scale}

    for taken, outputs in enumerate(runtime.stream(frames(), in_flight=3), start=1):
        assert read - taken <= 2
        expected = runtime.run({"image": golden["image"] * taken})["logits"]
        np.testing.assert_array_equal(expected, outputs["logits"])
    assert taken == read == 10
    assert list(runtime.stream([])) == []


def test_a_stream_raises_in_place_and_may_be_abandoned(runtime: Runtime, golden: dict[str, Any]) -> None:
    good: dict[str, Any] = {"image": golden["image"]}
    stream = runtime.stream(iter([good, good, {}, good]))

    assert next(stream)["logits"].shape == next(stream)["logits"].shape
    with pytest.raises(InputError, match="is missing"):
        next(stream)
    with pytest.raises(UsageError, match="in_flight is 0"):
        runtime.stream([good], in_flight=0)
    abandoned = runtime.stream(itertools.repeat(good))
    next(abandoned)
    del abandoned
    assert runtime.run(good)["logits"].shape == (1, 10)


def test_close_finishes_what_was_submitted_and_refuses_more(
    target: str, fashion_bundle: Path, golden: dict[str, Any]
) -> None:
    runtime = load(fashion_bundle, target)
    futures = [runtime.submit({"image": golden["image"]}) for _ in range(9)]
    runtime.close()
    runtime.close()

    assert all(future.done() and future.result()["logits"].shape == (1, 10) for future in futures)
    for call in (lambda: runtime.run({}), lambda: runtime.submit({}), runtime.describe):
        with pytest.raises(RuntimeClosedError):
            call()


def test_a_runtime_may_be_dropped_with_requests_in_flight(
    runtime: Runtime, target: str, fashion_bundle: Path, golden: dict[str, Any]
) -> None:
    expected = runtime.run({"image": golden["image"]})["logits"]
    futures = []
    for number in range(20):
        futures.append(load(fashion_bundle, target).submit({"image": golden["image"]}))
        if number % 2:  # the others are in flight while the next one is loaded
            futures[-1].result(timeout=60)

    for future in futures:
        np.testing.assert_array_equal(expected, future.result(timeout=60)["logits"])


@pytest.mark.parametrize("options", [{}, {"threads": 1}, {"check_finite": True}], ids=str)
def test_a_callback_may_close_and_the_rest_is_finished(
    target: str, fashion_bundle: Path, golden: dict[str, Any], options: dict[str, Any]
) -> None:
    runtime = load(fashion_bundle, target, **options)
    futures = [runtime.submit({"image": golden["image"]}) for _ in range(30)]
    in_callback(futures[3], runtime.close).result(timeout=60)
    assert all(future.result(timeout=60)["logits"].shape == (1, 10) for future in futures)
    with pytest.raises(RuntimeClosedError):
        runtime.submit({})


@pytest.mark.parametrize("options", [{}, {"threads": 1}], ids=str)
def test_callbacks_that_end_their_threads_leave_the_rest_to_be_finished(
    target: str, fashion_bundle: Path, golden: dict[str, Any], options: dict[str, Any]
) -> None:
    with load(fashion_bundle, target, **options) as runtime:
        futures = [runtime.submit({"image": golden["image"]}) for _ in range(30)]
        for future in futures[3:9]:
            future.add_done_callback(lambda _: threading.main_thread() is threading.current_thread() or sys.exit(1))
        assert all(future.result(timeout=60)["logits"].shape == (1, 10) for future in futures)
        assert runtime.submit({"image": golden["image"]}).result(timeout=60)


def test_a_callback_may_submit_more_than_fits_and_then_close(fashion_bundle: Path, golden: dict[str, Any]) -> None:
    """What does not fit into onnxruntime's queue runs in the callback's own thread, and so do its callbacks."""
    runtime = load(fashion_bundle, "ort-cpu")

    def flood() -> None:
        for _ in range(2000):
            runtime.submit({"image": golden["image"]})
        runtime.close()

    in_callback(runtime.submit({"image": golden["image"]}), flood).result(timeout=60)


@pytest.mark.parametrize("options", [{}, {"threads": 1}], ids=str)
def test_a_stream_may_be_abandoned_in_a_callback(
    target: str, fashion_bundle: Path, golden: dict[str, Any], options: dict[str, Any]
) -> None:
    """Where the garbage collector runs is nobody's choice."""
    good: dict[str, Any] = {"image": golden["image"]}
    with load(fashion_bundle, target, **options) as runtime:
        stream = runtime.stream(itertools.repeat(good), in_flight=4)
        next(stream)
        futures = [runtime.submit(good) for _ in range(30)]
        in_callback(futures[3], stream.close).result(timeout=60)  # type: ignore[attr-defined]
        assert runtime.submit(good).result(timeout=60)["logits"].shape == (1, 10)


def test_a_process_that_ends_after_a_close_in_a_callback_ends_well(target: str, fashion_bundle: Path) -> None:
    code = f"""
import numpy, threading
from perceiver_export.runtimes import load
runtime, closed = load({str(fashion_bundle)!r}, {target!r}), threading.Event()
feeds = {{"image": numpy.zeros((1, 3, 28, 28), numpy.float32)}}
futures = [runtime.submit(feeds) for _ in range(9)]
futures[0].add_done_callback(lambda future: (runtime.close(), closed.set()))
closed.wait(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_whatever_was_accepted_while_closing_is_finished(
    target: str, fashion_bundle: Path, golden: dict[str, Any]
) -> None:
    runtime = load(fashion_bundle, target)
    accepted: list[Future[dict[str, Any]]] = []

    def submit_until_closed() -> None:
        while True:
            try:
                accepted.append(runtime.submit({"image": golden["image"]}))
            except RuntimeClosedError:
                return

    thread = threading.Thread(target=submit_until_closed)
    thread.start()
    time.sleep(0.01)
    runtime.close()
    thread.join(timeout=60)

    assert not thread.is_alive()
    assert accepted
    assert all(future.result(timeout=60)["logits"].shape == (1, 10) for future in accepted)
