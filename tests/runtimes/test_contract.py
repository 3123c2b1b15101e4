# SPDX-License-Identifier: Apache-2.0
"""What every target must do: one suite over every backend that is here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes import Runtime, load
from perceiver_export.runtimes.errors import DeviceError, InputError, UsageError
from perceiver_export.runtimes.loading import load_onnx
from tests.fuzz.loads import differing_answers
from tests.runtimes.targets import EXPECTED


def test_outputs_are_those_of_torch(runtime: Runtime, golden: dict[str, Any]) -> None:
    found = runtime.run({"image": golden["image"]})["logits"]

    np.testing.assert_allclose(found, golden["logits"], atol=1e-4 * np.abs(golden["logits"]).max())


def test_inputs_outputs_and_the_engine_are_described(runtime: Runtime) -> None:
    assert [(spec.name, spec.dtype, spec.shape) for spec in runtime.inputs] == [("image", "float32", (1, 3, 28, 28))]
    assert [(spec.name, spec.dtype, spec.shape) for spec in runtime.outputs] == [("logits", "float32", (1, 10))]
    described = runtime.describe()
    assert described["target"] in EXPECTED
    assert described["precision"] == "fp32"
    assert described["version"]
    assert described["compiled"] == "at load" or (Path(described["compiled"]) / "engine.json").is_file()


def test_out_is_written_and_returned_and_arrays_are_the_callers_to_keep(
    runtime: Runtime, golden: dict[str, Any]
) -> None:
    buffer = np.full((1, 10), np.nan, np.float32)
    outputs = runtime.run({"image": golden["image"]}, out={"logits": buffer})
    returned = runtime.run({"image": golden["image"]})["logits"]
    kept = returned.copy()
    runtime.run({"image": golden["image"] * 2})
    runtime.submit({"image": golden["image"] * 3}).result(timeout=60)

    assert outputs["logits"] is buffer
    for array in (buffer, returned):
        np.testing.assert_array_equal(kept, array)


def test_out_must_not_share_memory_with_an_input(runtime: Runtime) -> None:
    memory = np.zeros((1, 3, 28, 28), np.float32)

    with pytest.raises(InputError, match="shares memory"):
        runtime.run({"image": memory}, out={"logits": memory.reshape(-1)[:10].reshape(1, 10)})


OTHER_SHAPE = r"shape \[1, 11\].*\[1, 10\].*\nhint: allocate `out` for 'logits' with that shape$"


@pytest.mark.parametrize(
    ("buffer", "said"),
    [
        (np.zeros((1, 11), np.float32), OTHER_SHAPE),
        (np.zeros((1, 10), np.float64), None),
        (np.zeros((1, 20), np.float32)[:, ::2], None),
        (np.broadcast_to(np.float32(0), (1, 10)), None),
    ],
    ids=["shape", "dtype", "strided", "read-only"],
)
def test_out_that_does_not_fit_is_refused(
    runtime: Runtime, golden: dict[str, Any], buffer: Any, said: str | None
) -> None:
    with pytest.raises(InputError, match=said):
        runtime.run({"image": golden["image"]}, out={"logits": buffer})
    with pytest.raises(InputError, match="`out` is 'scores'"):
        runtime.run({"image": golden["image"]}, out={"scores": buffer})
    with pytest.raises(InputError, match="`out` is ndarray"):
        runtime.run({"image": golden["image"]}, out=buffer)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "'image' is missing"),
        (None, "the inputs are of type NoneType"),
        (np.zeros((1, 3, 28, 28), np.float32), "the inputs are of type ndarray"),
        ({"picture": np.zeros((1, 3, 28, 28), np.float32)}, "'image' is missing"),
        ({"image": np.zeros((1, 3, 28, 28), np.float32), "mask": np.zeros(1)}, "unknown input 'mask'"),
        ({"image": np.zeros((1, 3, 28, 28), np.float64)}, "dtype float64"),
        ({"image": np.zeros((1, 3, 28, 27), np.float32)}, "has shape"),
        ({"image": np.zeros((3, 28, 28), np.float32)}, "has shape"),
        ({"image": np.zeros((2, 3, 28, 28), np.float32)}, "has shape"),
        ({"image": [[1.0]]}, "is of type list"),
    ],
)
def test_feeds_that_do_not_fit_are_refused_and_the_next_good_call_works(
    runtime: Runtime, golden: dict[str, Any], feeds: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        runtime.run(feeds)

    assert caught.value.hint
    assert runtime.run({"image": golden["image"]})["logits"].shape == (1, 10)


def test_strided_big_endian_and_read_only_feeds_give_the_same(runtime: Runtime, golden: dict[str, Any]) -> None:
    expected = runtime.run({"image": golden["image"]})["logits"]
    strided, big_endian = np.repeat(golden["image"], 2, axis=3)[..., ::2], golden["image"].astype(">f4")
    read_only = golden["image"].copy()
    read_only.flags.writeable = False

    for image in (strided, big_endian, read_only):
        np.testing.assert_array_equal(expected, runtime.run({"image": image})["logits"])
        np.testing.assert_array_equal(golden["image"], image)  # which is left as it is


def test_nan_goes_through(runtime: Runtime) -> None:
    assert np.isnan(runtime.run({"image": np.full((1, 3, 28, 28), np.nan, np.float32)})["logits"]).all()


def test_check_finite_refuses_nan_and_the_next_good_call_works(
    target: str, fashion_bundle: Path, golden: dict[str, Any]
) -> None:
    with load(fashion_bundle, target, check_finite=True) as runtime:
        for call in (runtime.run, lambda feeds: runtime.submit(feeds).result(timeout=60)):
            with pytest.raises(InputError, match="1 NaN or infinite"):
                call({"image": np.where(np.arange(2352).reshape(1, 3, 28, 28) == 5, np.inf, golden["image"])})
        assert runtime.run({"image": golden["image"]})["logits"].shape == (1, 10)


def test_eight_threads_get_their_own_answers(runtime: Runtime) -> None:
    assert differing_answers(runtime, threads=8, calls=20) == 0


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
