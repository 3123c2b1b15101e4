# SPDX-License-Identifier: Apache-2.0
"""What only the OpenVINO backend does: arithmetic as asked for, precisions, hints, requests that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes import build, load
from perceiver_export.runtimes.engines import openvino
from perceiver_export.runtimes.engines.backend import EngineOptions, Source
from perceiver_export.runtimes.engines.openvino_requests import OpenvinoEngine
from perceiver_export.runtimes.errors import BundleError, DeviceError
from perceiver_export.runtimes.manifest import TensorSpec
from tests.runtimes.targets import EXPECTED

pytestmark = pytest.mark.skipif(
    "openvino-cpu" not in EXPECTED, reason="PERCEIVER_TEST_TARGETS expects no OpenVINO: Python 3.10 is tested without"
)


def largest_difference(bundle: Path) -> tuple[float, dict[str, Any]]:
    """From the golden output, as a share of its scale; and what `describe` says."""
    with np.load(bundle / "golden.npz") as golden, load(bundle, "openvino-cpu") as runtime:
        found = runtime.run({"image": golden["input/image"]})["logits"]
        expected = golden["output/logits"]
        return float(np.abs(found - expected).max() / np.abs(expected).max()), runtime.describe()


def test_an_fp32_bundle_is_computed_in_fp32_even_where_the_cpu_prefers_bf16(fashion_bundle: Path) -> None:
    difference, described = largest_difference(fashion_bundle)

    assert difference < 1e-5
    assert described["arithmetic"] == "f32"


def test_fp16_halves_the_weights_and_keeps_the_answer(copied_bundle: Path) -> None:
    (whole,) = build(copied_bundle, "openvino-cpu")
    (half,) = build(copied_bundle, "openvino-cpu", precision="fp16")
    difference, described = largest_difference(copied_bundle)

    assert 1e-7 < difference < 5e-3
    assert described["precision"] == "fp16"
    assert described["compiled"] == str(half.directory)
    sizes = [(one.directory / "model.blob").stat().st_size for one in (whole, half)]
    assert sizes[1] < 0.75 * sizes[0]


def test_an_engine_with_half_the_weights_gives_the_same_answer_at_every_call(copied_bundle: Path) -> None:
    """OpenVINO 2026.4 does not, where it compresses a constant that is multiplied from the left."""
    with np.load(copied_bundle / "golden.npz") as golden:
        feeds = {"image": golden["input/image"]}
    (built,) = build(copied_bundle, "openvino-cpu", precision="fp16")
    with load(copied_bundle, "openvino-cpu") as runtime:
        (built.directory / "model.blob").unlink()  # weights may still lie in its memory
        first = runtime.run(feeds)["logits"]
        for outputs in runtime.stream([feeds] * 6):
            np.testing.assert_array_equal(first, outputs["logits"])


def test_the_engine_that_was_asked_for_last_is_taken_and_a_named_precision_is_kept(copied_bundle: Path) -> None:
    build(copied_bundle, "openvino-cpu", precision="fp16")
    build(copied_bundle, "openvino-cpu")
    build(copied_bundle, "openvino-cpu", precision="fp16")

    with load(copied_bundle, "openvino-cpu") as last, load(copied_bundle, "openvino-cpu", precision="fp32") as named:
        assert last.describe()["precision"] == "fp16"
        assert named.describe()["precision"] == "fp32"


def test_a_throughput_hint_is_kept_by_the_engine(copied_bundle: Path) -> None:
    (built,) = build(copied_bundle, "openvino-cpu", hint="throughput")

    with load(copied_bundle, "openvino-cpu", hint="throughput") as runtime:
        described = runtime.describe()
    assert (described["hint"], described["compiled"]) == ("throughput", str(built.directory))


def test_outputs_that_overflow_are_refused_where_that_is_asked_for(fashion_bundle: Path) -> None:
    image = (3e38 * np.sign(np.random.default_rng(0).normal(size=(1, 3, 28, 28)))).astype(np.float32)

    with load(fashion_bundle, "openvino-cpu") as runtime:
        assert not np.isfinite(runtime.run({"image": image})["logits"]).all()
    with (
        load(fashion_bundle, "openvino-cpu", check_finite=True) as strict,
        pytest.raises(DeviceError, match="is not finite, though every input is"),
    ):
        strict.run({"image": image})


def test_a_setting_that_openvino_does_not_know_is_refused(copied_bundle: Path) -> None:
    with pytest.raises(DeviceError, match="Unsupported property FOO") as caught:
        build(copied_bundle, "openvino-cpu", flags={"FOO": "1"})
    assert caught.value.hint == "leave --flag FOO out"


@pytest.mark.parametrize("device", ["openvino-gpu", "openvino-npu"])
def test_a_device_that_is_not_here_is_refused(fashion_bundle: Path, device: str) -> None:
    with pytest.raises(DeviceError, match="OpenVINO finds no"):
        load(fashion_bundle, device)


def test_a_graph_that_cannot_be_read_is_a_broken_bundle(tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x0a garbage")

    with pytest.raises(BundleError, match="cannot be loaded"):
        openvino.open(Source("openvino-cpu", tmp_path / "cut.onnx"), None, None)
    with pytest.raises(BundleError, match="does not exist"):
        openvino.open(Source("openvino-cpu", tmp_path / "none.onnx"), None, None)


@pytest.fixture
def product(tmp_path: Path) -> OpenvinoEngine:
    """Two matrices whose sizes only meet at run time."""
    import onnx

    (tmp_path / "product.onnx").write_bytes(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 20]>'
            "product (float[m, k] a, float[n, p] b) => (float[m, p] c) { c = MatMul(a, b) }"
        ).SerializeToString()
    )
    spec = TensorSpec("a", "float32", ("m", "k"))
    source = Source("openvino-cpu", tmp_path / "product.onnx", EngineOptions(), inputs=(spec,))
    return openvino.open(source, None, None)


def test_an_inference_that_fails_raises_from_run_and_from_the_future_and_the_next_one_works(
    product: OpenvinoEngine,
) -> None:
    """OpenVINO would not call back after the failure."""
    engine = product
    good = {"a": np.ones((2, 3), np.float32), "b": np.ones((3, 4), np.float32)}
    bad = {**good, "b": np.ones((5, 4), np.float32)}

    with pytest.raises(DeviceError, match="inference failed"):
        engine.run(bad)
    futures = [engine.submit(feeds) for feeds in (good, bad, good, bad, bad, bad, good)]
    for future, fails in zip(futures, (False, True, False, True, True, True, False), strict=True):
        if fails:
            with pytest.raises(DeviceError, match="inference failed"):
                future.result(timeout=60)
        else:
            np.testing.assert_array_equal(np.full((2, 4), 3, np.float32), future.result(timeout=60)["c"])
    out = {"c": np.empty((2, 4), np.float32)}
    engine.run_into(good, out)
    np.testing.assert_array_equal(np.full((2, 4), 3, np.float32), out["c"])
    engine.close()


def test_whatever_cannot_be_started_fails_however_many_wait_and_the_next_one_works(product: OpenvinoEngine) -> None:
    """As when a device goes away: each that fails starts the next one."""
    slow = {"a": np.ones((600, 600), np.float32), "b": np.ones((600, 600), np.float32)}
    wrong = {"a": np.ones((2, 3, 4), np.float32), "b": np.ones((3, 4), np.float32)}  # the checks are the runtime's
    futures = [product.submit(feeds) for feeds in [slow] * 4 + [wrong] * 2000]

    for future in futures[4:]:
        with pytest.raises(DeviceError, match="inference failed"):
            future.result(timeout=60)
    for feeds in (wrong, slow, wrong, slow):
        future = product.submit(feeds)
        assert isinstance(future.exception(timeout=60), DeviceError) == (feeds is wrong)
    with pytest.raises(DeviceError, match="inference failed"):
        product.run(wrong)
    product.close()
