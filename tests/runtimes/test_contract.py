# SPDX-License-Identifier: Apache-2.0
"""What every target must do: one suite over every backend that is here."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes import Runtime, build, load
from perceiver_export.runtimes.errors import DeviceError, InputError, RuntimeClosedError, UsageError
from perceiver_export.runtimes.loading import load_onnx
from tests.runtimes.targets import EXPECTED


@pytest.fixture(params=EXPECTED, scope="module")
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["at load", "built"], scope="module")
def runtime(request: pytest.FixtureRequest, target: str, fashion_bundle: Path, engines: Path) -> Iterator[Runtime]:
    path = engines if request.param == "built" else fashion_bundle
    with load(path, target, verify="never") as loaded:  # no stamps outside of a test's own cache
        yield loaded


@pytest.fixture(scope="module")
def engines(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle with an engine for every target."""
    copy = Path(shutil.copytree(fashion_bundle, tmp_path_factory.mktemp("engines") / "fashion"))
    for target in EXPECTED:
        build(copy, target)
    return copy


@pytest.fixture
def golden(fashion_bundle: Path) -> dict[str, Any]:
    with np.load(fashion_bundle / "golden.npz") as arrays:
        return {"image": arrays["input/image"], "logits": arrays["output/logits"]}


def test_outputs_are_those_of_torch(runtime: Runtime, golden: dict[str, Any]) -> None:
    found = runtime.run({"image": golden["image"]})["logits"]

    np.testing.assert_allclose(found, golden["logits"], atol=1e-4 * np.abs(golden["logits"]).max())


def test_inputs_and_outputs_are_described(runtime: Runtime) -> None:
    assert [(spec.name, spec.dtype, spec.shape) for spec in runtime.inputs] == [("image", "float32", (1, 3, 28, 28))]
    assert [(spec.name, spec.dtype, spec.shape) for spec in runtime.outputs] == [("logits", "float32", (1, 10))]


def test_describe_says_what_it_runs_on(runtime: Runtime) -> None:
    described = runtime.describe()

    assert described["target"] in EXPECTED
    assert described["precision"] == "fp32"
    assert described["version"]
    assert described["compiled"] == "at load" or (Path(described["compiled"]) / "engine.json").is_file()


def test_returned_arrays_are_the_callers_to_keep(runtime: Runtime, golden: dict[str, Any]) -> None:
    first = runtime.run({"image": golden["image"]})["logits"]
    kept = first.copy()
    runtime.run({"image": golden["image"] * 2})

    np.testing.assert_array_equal(kept, first)


def test_out_is_written_and_returned(runtime: Runtime, golden: dict[str, Any]) -> None:
    buffer = np.full((1, 10), np.nan, np.float32)
    outputs = runtime.run({"image": golden["image"]}, out={"logits": buffer})

    assert outputs["logits"] is buffer
    np.testing.assert_array_equal(runtime.run({"image": golden["image"]})["logits"], buffer)


def test_a_call_after_one_with_out_leaves_that_memory_alone(runtime: Runtime, golden: dict[str, Any]) -> None:
    buffer = np.empty((1, 10), np.float32)
    runtime.run({"image": golden["image"]}, out={"logits": buffer})
    kept = buffer.copy()
    runtime.run({"image": golden["image"] * 2})
    runtime.submit({"image": golden["image"] * 3}).result(timeout=60)

    np.testing.assert_array_equal(kept, buffer)


def test_out_must_not_share_memory_with_an_input(runtime: Runtime) -> None:
    memory = np.zeros((1, 3, 28, 28), np.float32)

    with pytest.raises(InputError, match="shares memory"):
        runtime.run({"image": memory}, out={"logits": memory.reshape(-1)[:10].reshape(1, 10)})


@pytest.mark.parametrize(
    "buffer",
    [
        np.zeros((1, 11), np.float32),
        np.zeros((1, 10), np.float64),
        np.zeros((1, 20), np.float32)[:, ::2],
        np.broadcast_to(np.float32(0), (1, 10)),
    ],
    ids=["shape", "dtype", "strided", "read-only"],
)
def test_out_that_does_not_fit_is_refused(runtime: Runtime, golden: dict[str, Any], buffer: Any) -> None:
    with pytest.raises(InputError):
        runtime.run({"image": golden["image"]}, out={"logits": buffer})
    with pytest.raises(InputError, match="`out` has"):
        runtime.run({"image": golden["image"]}, out={"scores": buffer})
    with pytest.raises(InputError, match="`out` is a ndarray"):
        runtime.run({"image": golden["image"]}, out=buffer)


def test_out_of_another_shape_is_to_be_allocated_with_that_of_the_model(
    runtime: Runtime, golden: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"shape \[1, 11\].*\[1, 10\]") as caught:
        runtime.run({"image": golden["image"]}, out={"logits": np.zeros((1, 11), np.float32)})
    assert caught.value.hint == "allocate `out` for 'logits' with that shape"


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "no inputs were given"),
        (None, "the inputs are a NoneType"),
        (np.zeros((1, 3, 28, 28), np.float32), "the inputs are a ndarray"),
        ({"picture": np.zeros((1, 3, 28, 28), np.float32)}, "'image' is missing"),
        ({"image": np.zeros((1, 3, 28, 28), np.float32), "mask": np.zeros(1)}, "unknown input 'mask'"),
        ({"image": np.zeros((1, 3, 28, 28), np.float64)}, "dtype float64"),
        ({"image": np.zeros((1, 3, 28, 27), np.float32)}, "has shape"),
        ({"image": np.zeros((3, 28, 28), np.float32)}, "has shape"),
        ({"image": np.zeros((2, 3, 28, 28), np.float32)}, "has shape"),
        ({"image": [[1.0]]}, "is a list"),
    ],
)
def test_feeds_that_do_not_fit_are_refused_and_the_next_good_call_works(
    runtime: Runtime, golden: dict[str, Any], feeds: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        runtime.run(feeds)

    assert caught.value.hint
    assert runtime.run({"image": golden["image"]})["logits"].shape == (1, 10)


def test_strided_and_big_endian_feeds_give_the_same(runtime: Runtime, golden: dict[str, Any]) -> None:
    expected = runtime.run({"image": golden["image"]})["logits"]
    strided = np.repeat(golden["image"], 2, axis=3)[..., ::2]

    np.testing.assert_array_equal(expected, runtime.run({"image": strided})["logits"])
    np.testing.assert_array_equal(expected, runtime.run({"image": golden["image"].astype(">f4")})["logits"])


def test_read_only_feeds_are_taken_and_left_as_they_are(runtime: Runtime, golden: dict[str, Any]) -> None:
    image = golden["image"].copy()
    image.flags.writeable = False

    np.testing.assert_array_equal(
        runtime.run({"image": golden["image"]})["logits"], runtime.run({"image": image})["logits"]
    )
    np.testing.assert_array_equal(golden["image"], image)


def test_nan_goes_through(runtime: Runtime) -> None:
    assert np.isnan(runtime.run({"image": np.full((1, 3, 28, 28), np.nan, np.float32)})["logits"]).all()


def test_check_finite_refuses_nan_and_the_next_good_call_works(
    target: str, fashion_bundle: Path, golden: dict[str, Any]
) -> None:
    with load(fashion_bundle, target, check_finite=True) as runtime:
        for call in (runtime.run, lambda feeds: runtime.submit(feeds).result(timeout=60)):
            with pytest.raises(InputError, match="1 values that are not finite"):
                call({"image": np.where(np.arange(2352).reshape(1, 3, 28, 28) == 5, np.inf, golden["image"])})
        assert runtime.run({"image": golden["image"]})["logits"].shape == (1, 10)


def test_eight_threads_get_their_own_answers(runtime: Runtime) -> None:
    images = np.random.default_rng(0).normal(size=(8, 1, 3, 28, 28)).astype(np.float32)
    expected = [runtime.run({"image": image})["logits"] for image in images]
    barrier = threading.Barrier(8)

    def work(index: int) -> bool:
        barrier.wait()
        return all(np.array_equal(runtime.run({"image": images[index]})["logits"], expected[index]) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_submit_gives_a_future(runtime: Runtime, golden: dict[str, Any]) -> None:
    futures = [runtime.submit({"image": golden["image"] * scale}) for scale in (1, 2, 3)]

    for scale, future in zip((1, 2, 3), futures, strict=True):
        expected = runtime.run({"image": golden["image"] * scale})["logits"]
        np.testing.assert_array_equal(expected, future.result(timeout=60)["logits"])
    with pytest.raises(InputError):
        runtime.submit({}).result(timeout=60)


def test_more_can_be_submitted_than_run_at_once(runtime: Runtime, golden: dict[str, Any]) -> None:
    images = [golden["image"] * scale for scale in range(1, 21)]
    futures = [runtime.submit({"image": image}) for image in images]

    for image, future in zip(images, futures, strict=True):
        np.testing.assert_array_equal(runtime.run({"image": image})["logits"], future.result(timeout=60)["logits"])


def test_one_thread_can_be_submitted_to_as_well(target: str, fashion_bundle: Path, golden: dict[str, Any]) -> None:
    with load(fashion_bundle, target, threads=1) as runtime:
        expected = runtime.run({"image": golden["image"]})["logits"]
        for outputs in runtime.stream([{"image": golden["image"]}] * 4):
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
    with pytest.raises(InputError, match="no inputs were given"):
        next(stream)
    with pytest.raises(UsageError, match="in_flight is 0"):
        runtime.stream([good], in_flight=0)
    abandoned = runtime.stream(itertools.repeat(good))
    next(abandoned)
    del abandoned
    assert runtime.run(good)["logits"].shape == (1, 10)


def test_several_runtimes_live_in_one_process(target: str, fashion_bundle: Path, golden: dict[str, Any]) -> None:
    with load(fashion_bundle, target) as first, load(fashion_bundle, target, threads=1) as second:
        left, right = (loaded.run({"image": golden["image"]})["logits"] for loaded in (first, second))

    np.testing.assert_allclose(left, right, atol=1e-5)


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


@pytest.mark.parametrize("options", [{}, {"threads": 1}, {"check_finite": True}], ids=str)
def test_a_callback_may_close_and_the_rest_is_finished(
    target: str, fashion_bundle: Path, golden: dict[str, Any], options: dict[str, Any]
) -> None:
    runtime = load(fashion_bundle, target, **options)
    closed: Future[None] = Future()

    def close(_: Future[dict[str, Any]]) -> None:
        try:
            runtime.close()
            closed.set_result(None)
        except BaseException as error:
            closed.set_exception(error)

    futures = [runtime.submit({"image": golden["image"]}) for _ in range(30)]
    futures[3].add_done_callback(close)  # which is not done yet, or it closes here

    closed.result(timeout=60)
    assert all(future.result(timeout=60)["logits"].shape == (1, 10) for future in futures)
    with pytest.raises(RuntimeClosedError):
        runtime.submit({})


@pytest.mark.parametrize("options", [{}, {"threads": 1}], ids=str)
def test_a_stream_may_be_abandoned_in_a_callback(
    target: str, fashion_bundle: Path, golden: dict[str, Any], options: dict[str, Any]
) -> None:
    """Where the garbage collector runs is nobody's choice."""
    good: dict[str, Any] = {"image": golden["image"]}
    with load(fashion_bundle, target, **options) as runtime:
        stream = runtime.stream(itertools.repeat(good), in_flight=4)
        next(stream)
        abandoned = threading.Event()

        def abandon(_: Future[dict[str, Any]]) -> None:
            stream.close()  # type: ignore[attr-defined]
            abandoned.set()

        [runtime.submit(good) for _ in range(30)][3].add_done_callback(abandon)
        assert abandoned.wait(timeout=60)
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


def test_a_target_that_does_not_exist_is_refused(fashion_bundle: Path) -> None:
    for name in ("abacus", "ort-CPU", "ort-"):
        with pytest.raises(DeviceError, match=f"there is no target '{name}'") as caught:
            load(fashion_bundle, device=name)
        assert "ort-NAME" in caught.value.hint
    with pytest.raises(DeviceError, match="no execution provider 'gpu'"):
        load(fashion_bundle, device="ort-gpu")
    for threads in (0, 100_000):
        with pytest.raises(UsageError, match=f"threads is {threads}"):
            load(fashion_bundle, threads=threads)
        with pytest.raises(UsageError, match=f"threads is {threads}"):
            load_onnx(fashion_bundle / "model.onnx", threads=threads)
    with pytest.raises(UsageError, match="no part 'encoder'"):
        load(fashion_bundle, part="encoder")
