# SPDX-License-Identifier: Apache-2.0
"""TensorRT's graphs: numbers on ONNX Runtime's CPU as a reference (it is not TensorRT), overflow, bundles."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import pytest

from perceiver_export.calibration import QuantizeOptions, quantize
from perceiver_export.calibration.graphs import sqnr
from perceiver_export.calibration.lowering.attention import find_attentions, pad_heads
from perceiver_export.calibration.lowering.half import to_half
from perceiver_export.calibration.lowering.lint import lint
from perceiver_export.calibration.lowering.tensorrt import calibrated, lower_bundle, lower_for_tensorrt, magnitudes
from perceiver_export.calibration.quantization.options import Scheme
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.runtimes import load, open_bundle
from perceiver_export.runtimes.bundle import Bundle, golden_arrays
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.errors import BundleError, GateError, UnsupportedModelError
from tests.calibration.damaged_scales import rehashed
from tests.calibration.linear_bundles import CASES
from tests.calibration.lint_cases import compiled, run
from tests.calibration.onnx_text import write
from tests.conftest import FASHION, SmallBundle
from tests.preset_graphs import quantized

LONG, MEBIFLOATS = 32, 4
SHAPE = f"float[{MEBIFLOATS},1024,1024]"
LOOK = f"""
import sys
import numpy as np
from pathlib import Path
from perceiver_export.calibration.lowering.tensorrt import magnitudes
from perceiver_export.runtimes.machine import peak_memory
feeds = {{"a0": np.ones(({MEBIFLOATS}, 1024, 1024), np.float32)}}
import onnxruntime
before = peak_memory()
found = magnitudes(Path(sys.argv[1]), feeds)
print(found["a1"], peak_memory() - before)
"""


@pytest.fixture
def language(small_bundle: SmallBundle) -> Bundle:
    """Masked, with heads of 4 for queries and 6 for values in its decoder."""
    return open_bundle(small_bundle("language"))


def graph(bundle: Bundle) -> ir.Model:
    return ir.load(bundle.path / "model.onnx")


def scaled_inside(bundle: Bundle, factor: float) -> ir.Model:
    """The same function with the inside of every MLP ``factor`` times as large, so that fp16 overflows there.

    GELU is not linear, but far from 0 it nearly is: the model computes something else, and in fp32 it can.
    """
    model = graph(bundle)
    ir.external_data.load_to_model(model)
    for name, value in model.graph.initializers.items():
        if ".mlp.hidden." in name or ".mlp.output.weight" in name:
            array = value.const_value.numpy() * np.float32(factor if "hidden" in name else 1 / factor)  # type: ignore[union-attr]
            value.const_value = ir.tensor(array, name=name)
    return model


def test_a_trained_model_keeps_more_than_50_db_in_fp16(copied_bundle: Path) -> None:
    before = {path.name for path in copied_bundle.iterdir()}
    strong = lower_bundle(copied_bundle, "fp16")

    assert strong.name == "tensorrt-fp16"
    assert min(strong.sqnr.values()) > 60
    # Its cross-attention has scores of hundreds, where fp16 is half a unit off: 43 dB if all that makes them were not
    # fp32, the inputs and their deviations too.
    reasons = {re.sub(r" [\d.]+$", "", reason) for reason in strong.kept["model"].values()}
    assert reasons == {"its scores reach", "it squares or sums"}
    names = {name.split("/")[0] for name in strong.kept["model"]} - {"features.image"}
    assert names == {"encoder.cross_attentions.0.attention", "encoder.cross_attentions.0.input_norm", "inputs.image"}
    assert not any("MatMul_2" in name for name in strong.kept["model"])  # what reads the inputs
    assert {path.name for path in copied_bundle.iterdir()} - before == set(strong.files)
    assert set(strong.files) == {"model.tensorrt-fp16.onnx", "tensorrt-fp16.weights"}


def test_a_plain_graph_keeps_queries_and_keys_of_large_scores(plain_fashion_bundle: Path) -> None:
    bundle = open_bundle(plain_fashion_bundle)
    feeds, model = golden_arrays(bundle, "model", "input"), graph(bundle)
    kept = to_half(model, "fp16", magnitudes(bundle.path / "model.onnx", feeds))
    expected = run(bundle.path / "model.onnx", feeds)["logits"]

    assert sqnr(expected, run(model, feeds, bundle.path)["logits"]) > 50
    assert {reason.rsplit(" ", 1)[0] for reason in kept.values()} == {"its scores reach"}
    assert {name.split("/")[0] for name in kept} == {
        "encoder.cross_attentions.0.attention",
        "encoder.cross_attentions.0.attention.key",
    }


def test_a_bundle_with_more_graphs_is_whole_and_shares_weights(lowered_bundle: Path) -> None:
    bundle = open_bundle(lowered_bundle, verify="always")
    assert bundle.manifest.parts["model"].lowered.keys() == {"tensorrt-fp16"}
    sizes = {name: (lowered_bundle / name).stat().st_size for name in ("model.weights", "tensorrt-fp16.weights")}
    assert 0.4 < sizes["tensorrt-fp16.weights"] / sizes["model.weights"] < 0.6
    for version in ("10.3", "10.13", "10.16", "11.4"):
        (found,) = lint(lowered_bundle, "tensorrt", version)
        assert not found.findings
    with load(lowered_bundle, "ort-cpu") as runtime:  # the canonical graph is as it was
        found_logits = runtime.run(golden_arrays(bundle, "model", "input"))["logits"]
    np.testing.assert_allclose(found_logits, golden_arrays(bundle, "model", "output")["logits"], atol=1e-4)


def test_lowering_again_replaces_and_other_precisions_stand_beside(lowered_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(lowered_bundle, tmp_path / "bundle")
    lower_bundle(bundle, "fp16")
    half = lower_bundle(bundle, "bf16")
    first, last = open_bundle(lowered_bundle).manifest, open_bundle(bundle, verify="always").manifest

    assert 40 < min(half.sqnr.values()) < 55  # 8 bits where fp16 has 11
    assert last.parts["model"].lowered.keys() == {"tensorrt-fp16", "tensorrt-bf16"}
    assert first.files["model.tensorrt-fp16.onnx"] == last.files["model.tensorrt-fp16.onnx"]


def test_a_bundle_that_cannot_be_lowered_stays_as_it_was(copied_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in copied_bundle.iterdir())
    scaled = scaled_inside(open_bundle(copied_bundle), 3e4)
    ir.save(scaled, copied_bundle / "model.onnx", external_data="model.weights")
    hidden = "perceiver_export.calibration.lowering.tensorrt._hazards"
    monkeypatch.setattr(hidden, lambda bundle, part: {})  # as if nothing had been seen to overflow
    manifest = (rehashed(copied_bundle) / "manifest.json").read_bytes()

    with pytest.raises(GateError, match="NaN or infinite"):
        lower_bundle(copied_bundle, "fp16")

    assert sorted(path.name for path in copied_bundle.iterdir()) == before
    assert (copied_bundle / "manifest.json").read_bytes() == manifest


def test_a_bundle_without_golden_inputs_cannot_be_compared(tmp_path: Path) -> None:
    bundle = CASES["arrays"].write(tmp_path / "bundle")
    for precision in get_args(Precision):
        with pytest.raises(BundleError, match="no golden input"):
            lower_bundle(bundle, precision)


def test_an_invalid_graph_is_not_published(copied_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(model: ir.Model, *_: Any) -> dict[str, str]:
        half = next(node.outputs[0] for node in model.graph if node.op_type == "LayerNormalization")
        half.type = ir.TensorType(ir.DataType.FLOAT16)
        return {}

    before = sorted(path.name for path in copied_bundle.iterdir())
    monkeypatch.setattr("perceiver_export.calibration.lowering.tensorrt.to_half", mixed)

    with pytest.raises(UnsupportedModelError, match="the rewritten graph is not valid"):
        lower_bundle(copied_bundle, "fp16")
    assert sorted(path.name for path in copied_bundle.iterdir()) == before


@pytest.mark.parametrize("system", ["pictures", "flow", "first_sound", "video"])
def test_every_kind_of_model_keeps_more_than_50_db(system: str, small_bundle: SmallBundle, tmp_path: Path) -> None:
    bundle = shutil.copytree(small_bundle(system, split=system == "video"), tmp_path / "bundle")
    lowered = lower_bundle(bundle, "fp16")

    assert min(lowered.sqnr.values()) > 50
    if system == "video":  # each of its parts is lowered
        assert set(lowered.kept) == {"encoder", "decoder_video", "decoder_sound", "decoder_label"}
        assert set(lowered.kept["decoder_video"].values()) == {"it squares or sums"}


def test_looking_for_overflow_keeps_no_tensor_alive(tmp_path: Path) -> None:
    """Optical flow took more than 22 GB when all reductions came last."""
    steps = range(1, LONG + 1)
    chain = "".join(f"a{step} = Sin(a{step - 1})  " for step in steps)
    known = ", ".join(f"{SHAPE} a{step}" for step in steps)
    body = f"({SHAPE} a0) => (float y) <{known}> {{ {chain} y = ReduceMax<keepdims = 0>(a{LONG}) }}"
    path = write(tmp_path / "long.onnx", body)
    done = subprocess.run([sys.executable, "-c", LOOK, str(path)], check=True, capture_output=True, text=True)
    largest, growth = map(float, done.stdout.split())

    assert largest == pytest.approx(np.sin(1.0))
    assert growth < 4 * MEBIFLOATS * LONG / 4  # MiB; all of them at once would be four times that


@pytest.fixture
def convolution(small_bundle: SmallBundle) -> Path:
    """Pads pictures with minus infinity in front of its pooling."""
    return small_bundle("pictures")


@pytest.mark.parametrize(("model", "factor"), [("fashion_bundle", 3e4), ("convolution", 1e6)])
def test_what_overflows_stays_fp32_where_it_was_seen_to(
    model: str, factor: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle = open_bundle(request.getfixturevalue(model))
    feeds = golden_arrays(bundle, "model", "input")
    ir.save(scaled_inside(bundle, factor), tmp_path / "scaled.onnx", external_data="scaled.weights")
    hazards = magnitudes(tmp_path / "scaled.onnx", feeds)
    expected = run(tmp_path / "scaled.onnx", feeds)["logits"]

    blind, told = ir.load(tmp_path / "scaled.onnx"), ir.load(tmp_path / "scaled.onnx")
    to_half(blind, "fp16")
    kept = to_half(told, "fp16", hazards)
    found = run(told, feeds, tmp_path)["logits"]

    assert not np.isfinite(run(blind, feeds, tmp_path)["logits"]).all()
    assert np.isfinite(found).all()
    assert sqnr(expected, found) > 50
    overflowing = {name.split("/")[0] for name, reason in kept.items() if reason.startswith("|")}
    assert overflowing
    assert all(name.endswith((".mlp.hidden", ".mlp.activation", ".mlp.output")) for name in overflowing)


def test_bf16_keeps_what_fp16_cannot(fashion_bundle: Path) -> None:
    model = scaled_inside(open_bundle(fashion_bundle), 3e4)
    hazards = {node.outputs[0].name or "": 1e6 for node in model.graph if node.op_type == "Gelu"}

    assert to_half(model, "bf16", hazards) == {}


@pytest.mark.parametrize("mask", ["none", "some", "all"])
def test_masks_are_finite_in_fp16(language: Bundle, mask: str) -> None:
    feeds = dict(golden_arrays(language, "model", "input"))
    keep = {"none": 0, "some": 5, "all": 32}[mask]
    feeds["tokens_mask"] = (np.arange(32) < keep).astype(np.int32)[None]
    model = graph(language)
    to_half(model, "fp16")
    expected, found = run(language.path / "model.onnx", feeds), run(model, feeds, language.path)

    assert np.isfinite(found["logits"]).all()
    assert sqnr(expected["logits"], found["logits"]) > 50


def test_padded_heads_give_the_same_numbers(language: Bundle) -> None:
    feeds = dict(golden_arrays(language, "model", "input"))
    model = graph(language)

    assert [(one.qk, one.v) for one in find_attentions(model.graph)] == [(24, 24), *[(4, 4)] * 4, (4, 6)]
    assert pad_heads(model) == 5
    assert all(one.fits for one in find_attentions(model.graph))
    assert pad_heads(model) == 0
    expected = run(language.path / "model.onnx", feeds)["logits"]
    np.testing.assert_allclose(run(model, feeds, language.path)["logits"], expected, atol=2e-6)


@pytest.mark.usefixtures("untimed")
def test_int8_beside_int4_weights_is_rewritten_in_every_precision(fashion_bundle: Path, tmp_path: Path) -> None:
    """The graph is of opset 21, where onnxruntime's optimizer spoils Q/DQ of int8 activations."""
    mixture: dict[str, Scheme] = {"encoder.self_attentions.0.2.mlp.*": "int4-weights", "decoder.*": "float"}
    bundle = quantize(
        fashion_bundle,
        FASHION / "held_out.npz",
        tmp_path / "mixed",
        QuantizeOptions(precision=mixture, samples=8, weight_bits=8),
    )

    for precision, least in (("fp32", 100), ("fp16", 30), ("bf16", 25)):
        lowered = lower_bundle(bundle, precision)  # type: ignore[arg-type]
        assert lowered.sqnr["model/logits"] > least
    assert compiled(bundle.file("model.tensorrt-fp16.onnx")).int8_products > 0
    calibration = read_calibration(bundle)
    assert calibration is not None
    assert calibration.how == "int8, ranges by mse, 8-bit weights; of 28 layers 2 int4-weights, 6 float"


def test_a_read_only_file_system_is_one_error(copied_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There even removing a file that was never written fails."""

    def read_only(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(ir, "save", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(BundleError, match="cannot be written: Read-only file system"):
        lower_bundle(open_bundle(copied_bundle), "fp32")


def test_the_first_10_have_no_int4(int4_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(int4_bundle, tmp_path / "int4")
    lower_bundle(bundle, "fp16")
    (early,), (late,) = (lint(bundle, version=version) for version in ("10.3", "10.13"))

    assert [(finding.rule, finding.fix.split(",")[0]) for finding in early.findings] == [
        ("opset", "quantize with --scheme int8-weights")
    ]
    assert not late.findings


def test_an_int8_graph_keeps_its_numbers_in_fp16(fashion_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(fashion_bundle)
    canonical, lowered = graph(bundle), graph(bundle)
    for model in (canonical, lowered):
        quantized(model)
    lower_for_tensorrt(lowered, "fp16")
    feeds = golden_arrays(bundle, "model", "input")
    expected, found = (run(model, feeds, bundle.path)["logits"] for model in (canonical, lowered))

    # Rounding before Q moves codes by a step here and there: as far off as int8 is from fp32, and no further.
    assert sqnr(expected, found) > 15
    ir.save(lowered, tmp_path / "lowered.onnx")
    assert not lint(tmp_path / "lowered.onnx", version="10.9")[0].findings


def test_what_calibration_saw_overflow_counts_too(tmp_path: Path) -> None:
    record = tmp_path / "calibration.json"
    record.write_text('{"parts": {"model": {"hazards": [{"name": "x", "largest": 7e4, "depth": 1}]}}}')

    assert calibrated(record, "model") == {"x": 7e4}
    assert calibrated(tmp_path / "missing.json", "model") == calibrated(record, "decoder") == {}
