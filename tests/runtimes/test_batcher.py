# SPDX-License-Identifier: Apache-2.0
"""The batcher: everyone gets their own answer, batches fill up, nothing is lost or piles up."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes import Batcher, Runtime, compare
from perceiver_export.runtimes.errors import InputError, RuntimeClosedError, UsageError
from perceiver_export.runtimes.manifest import TensorSpec
from perceiver_export.runtimes.runtime import Array, Feeds
from tests.runtimes.callbacks import in_callback
from tests.runtimes.models import NumpyEngine

IMAGES = np.random.default_rng(0).normal(size=(24, 1, 3, 28, 28)).astype(np.float32)
EXPECTED = [image.sum(axis=(2, 3)) for image in IMAGES]


def of_batch(batch: int | str) -> Runtime:
    """A model that sums each channel, for 1 to 8 samples a call ("batch") or a fixed number."""
    ranges = {"batch": (1, 8)} if batch == "batch" else {}
    inputs = (TensorSpec("image", "float32", (batch, 3, 28, 28), "", ranges),)
    outputs = (TensorSpec("logits", "float32", (batch, 3), "", ranges),)
    engine = NumpyEngine(lambda feeds: {"logits": feeds["image"].sum(axis=(2, 3))}, inputs, outputs)
    return Runtime(engine, inputs, outputs, "fp32", check_finite=True)


@pytest.fixture(params=["batch", 4])
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    with of_batch(request.param) as made:
        yield made


class Counting:
    """A runtime that notes how many samples each call had."""

    def __init__(self, runtime: Runtime) -> None:
        self.inputs, self.outputs, self.num_queries = runtime.inputs, runtime.outputs, runtime.num_queries
        self.check_finite = runtime.check_finite
        self.runtime = runtime
        self.rows: list[int] = []

    def submit(self, feeds: Feeds) -> Future[dict[str, Array]]:
        self.rows.append(len(feeds["image"]))
        return self.runtime.submit(feeds)


class Slow(Counting):
    """Takes nothing before it is released."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.release = threading.Event()

    def submit(self, feeds: Feeds) -> Future[dict[str, Array]]:
        self.release.wait(60)
        return super().submit(feeds)


def test_everyone_gets_their_own_answer(runtime: Runtime) -> None:
    with Batcher(runtime) as batcher, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda image: batcher.run({"image": image})["logits"], IMAGES))

    for found, wanted in zip(answers, EXPECTED, strict=True):
        assert compare(found, wanted, 1e-4)


def test_requests_of_several_samples_are_answered_whole(runtime: Runtime) -> None:
    with Batcher(runtime) as batcher:
        futures = [batcher.submit({"image": IMAGES[start : start + 3, 0]}) for start in range(0, 24, 3)]
        for start, future in zip(range(0, 24, 3), futures, strict=True):
            found = future.result(timeout=60)["logits"]
            assert compare(found, np.concatenate(EXPECTED[start : start + 3]), 1e-4)


def test_what_waits_together_runs_together() -> None:
    with of_batch("batch") as runtime:
        counting: Any = Counting(runtime)
        with Batcher(counting, max_wait=0.5) as batcher:
            start = time.perf_counter()
            futures = [batcher.submit({"image": image}) for image in IMAGES]
            for future in futures:
                future.result(timeout=60)
            assert time.perf_counter() - start < 30
        assert counting.rows == [8, 8, 8]


def test_a_request_alone_waits_no_longer_than_it_may() -> None:
    with of_batch("batch") as runtime:
        counting: Any = Counting(runtime)
        with Batcher(counting, max_batch=2, max_wait=0.01) as batcher:
            batcher.run({"image": IMAGES[0]})
            batcher.run({"image": IMAGES[1]})
            futures = [batcher.submit({"image": image}) for image in IMAGES[:5]]
            for future in futures:
                future.result(timeout=60)
        assert counting.rows[:2] == [1, 1]
        assert max(counting.rows) <= 2
        assert sum(counting.rows) == 7


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((9, 3, 28, 28), np.float32),
        np.zeros((0, 3, 28, 28), np.float32),
        np.zeros((1, 3, 28, 27), np.float32),
        np.zeros((1, 3, 28, 28), np.float64),
        np.full((1, 3, 28, 28), np.nan, np.float32),
        "picture.png",
    ],
    ids=["too many", "none", "shape", "dtype", "NaN", "type"],
)
def test_a_bad_request_is_refused_and_the_others_are_answered(runtime: Runtime, image: Any) -> None:
    with Batcher(runtime, max_wait=0.05) as batcher:
        good = batcher.submit({"image": IMAGES[0]})
        with pytest.raises(InputError):
            batcher.submit({"image": image})
        assert good.result(timeout=60)["logits"].shape == (1, 3)


def test_close_answers_what_was_accepted_and_refuses_more(runtime: Runtime) -> None:
    batcher = Batcher(runtime)
    futures = [batcher.submit({"image": image}) for image in IMAGES]
    batcher.close()
    batcher.close()

    assert all(future.done() and future.result()["logits"].shape == (1, 3) for future in futures)
    with pytest.raises(RuntimeClosedError):
        batcher.submit({"image": IMAGES[0]})


def test_a_cancelled_request_is_left_out(runtime: Runtime) -> None:
    with Batcher(runtime, max_wait=0.2) as batcher:
        futures = [batcher.submit({"image": image}) for image in IMAGES[:3]]
        cancelled = futures[2].cancel()
        assert futures[0].result(timeout=60)["logits"].shape == (1, 3)
        assert futures[2].cancelled() == cancelled


def test_a_runtime_that_is_closed_first_fails_the_request_and_nothing_hangs() -> None:
    runtime = of_batch(4)
    with Batcher(runtime) as batcher:
        runtime.close()
        with pytest.raises(RuntimeClosedError):
            batcher.submit({"image": IMAGES[0]}).result(timeout=60)


def test_submit_waits_while_four_batches_are_queued() -> None:
    """A device that is slow: requests must not pile up without end."""
    accepted = 0
    with of_batch(4) as runtime:
        slow: Any = Slow(runtime)
        with Batcher(slow) as batcher:

            def flood() -> None:
                nonlocal accepted
                for _ in range(100):
                    batcher.submit({"image": IMAGES[0]})
                    accepted += 1

            thread = threading.Thread(target=flood)
            thread.start()
            time.sleep(0.5)
            assert 16 <= accepted <= 24
            slow.release.set()
            thread.join(60)
            assert accepted == 100


def test_what_cannot_be_batched_is_refused() -> None:
    with of_batch(4) as runtime:
        for max_batch, max_wait in ((5, 0.0), (0, 0.0), (4, -1.0)):
            with pytest.raises(UsageError):
                Batcher(runtime, max_batch, max_wait)


def test_a_callback_may_submit_and_close_and_the_rest_is_answered(runtime: Runtime) -> None:
    """More than may be queued, so that waiting there would be for ever."""
    batcher = Batcher(runtime)

    def submit_and_close() -> list[Future[dict[str, Array]]]:
        more = [batcher.submit({"image": IMAGES[index % 24]}) for index in range(50)]
        batcher.close()
        return more

    futures = [batcher.submit({"image": image}) for image in IMAGES]
    futures += in_callback(futures[4], submit_and_close).result(timeout=60)
    assert all(future.result(timeout=60)["logits"].shape == (1, 3) for future in futures)
    batcher.close()
    with pytest.raises(RuntimeClosedError):
        batcher.submit({"image": IMAGES[0]})


def test_a_failed_requests_callback_may_close() -> None:
    """The runtime is closed, so that its answer comes in the batcher's own thread."""
    runtime = of_batch(4)
    batcher = Batcher(runtime, max_wait=0.2)
    future = batcher.submit({"image": IMAGES[0]})
    closed = in_callback(future, batcher.close)
    runtime.close()

    closed.result(timeout=60)
    with pytest.raises(RuntimeClosedError):
        future.result(timeout=60)
    batcher.close()


def test_a_callback_that_ends_its_thread_takes_nobodys_answer(runtime: Runtime) -> None:
    with Batcher(runtime, max_wait=0.2) as batcher:
        futures = [batcher.submit({"image": image}) for image in IMAGES[:4]]
        futures[0].add_done_callback(lambda _: sys.exit("in a callback"))
        assert all(future.result(timeout=60)["logits"].shape == (1, 3) for future in futures)


def test_close_returns_when_answers_are_there_and_their_callbacks_have_run(runtime: Runtime) -> None:
    batcher = Batcher(runtime)
    called: list[Future[dict[str, Array]]] = []

    def slow(done: Future[dict[str, Array]]) -> None:
        time.sleep(0.002)
        called.append(done)

    futures = [batcher.submit({"image": image}) for image in IMAGES]
    for future in futures:
        future.add_done_callback(slow)
    batcher.close()

    assert len(called) == len(futures)


def test_close_refuses_those_who_wait_for_room() -> None:
    refused = threading.Event()
    with of_batch(4) as runtime:
        slow: Any = Slow(runtime)
        batcher = Batcher(slow)

        def flood() -> None:
            try:
                for _ in range(100):
                    batcher.submit({"image": IMAGES[0]})
            except RuntimeClosedError:
                refused.set()

        flooding, closing = threading.Thread(target=flood), threading.Thread(target=batcher.close)
        flooding.start()
        time.sleep(0.2)
        closing.start()
        assert refused.wait(timeout=60)
        slow.release.set()
        for thread in (flooding, closing):
            thread.join(timeout=60)
            assert not thread.is_alive()
