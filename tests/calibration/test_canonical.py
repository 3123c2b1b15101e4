# SPDX-License-Identifier: Apache-2.0
"""The canonical form, what its lowerings leave bit-equal, and who takes it; and int4 weights on both engines.

OpenVINO's kernels give wrong numbers for some blocks of int4, which must not be written.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from perceiver_export.calibration import measure_sensitivity, quantize
from perceiver_export.calibration.graphs import sqnr
from perceiver_export.calibration.lowering.onnxruntime import lower_for_arm
from perceiver_export.calibration.quantization.engines import measure_coverage
from perceiver_export.calibration.quantization.integers import quantize_channels
from perceiver_export.calibration.quantization.options import QuantizeOptions, Scheme
from perceiver_export.calibration.quantization.part import QuantizedPart
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.runtimes import load, open_bundle
from perceiver_export.runtimes.engines.backend import Engine
from perceiver_export.runtimes.errors import GateError
from perceiver_export.runtimes.opening import open_engine
from perceiver_export.runtimes.runtime import Array
from tests.calibration.graphs import BLOCK, FOLDED, GEMM, RELU, build, inputs, quantized, run
from tests.calibration.onnx_text import write
from tests.conftest import FASHION

GRAPHS = {"block": BLOCK, "gemm": GEMM, "folded": FOLDED, "relu": RELU}
PLAIN = "plain (float[4, 16] x, float[16, 16] w) => (float[4, 16] y) { y = MatMul (x, w) }"


Int8 = Callable[[str], tuple[QuantizedPart, Path]]


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Int8:
    """``int8(text)``: a graph quantized once, and the folder of its files."""

    @functools.cache
    def made(text: str) -> tuple[QuantizedPart, Path]:
        folder = tmp_path_factory.mktemp("graph")
        return quantized(text, folder)[0], folder / "int8"

    return made


@pytest.mark.parametrize("name", GRAPHS)
def test_the_form_is_canonical(name: str, int8: Int8) -> None:
    part, folder = int8(GRAPHS[name])
    path = folder / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    graph = ir.load(path).graph
    products = {linear.node.name for linear in part.integer_linears}
    dequantized = Counter[str]()
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[2] is not None
            assert node.inputs[2].const_value is not None
            assert not node.inputs[2].const_value.numpy().any(), "zero points are 0"
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            dequantized[str(node.inputs[0].name)] += 1
        if node.op_type == "QuantizeLinear":
            assert {reader.op_type for reader in node.outputs[0].consumers()} == {"DequantizeLinear"}
            source = node.inputs[0].producer() if node.inputs[0] is not None else None
            assert source is None or source.name not in products, "outputs are not quantized"

    assert set(dequantized.values()) == {1}, "one DequantizeLinear a weight"
    assert len(dequantized) == len({linear.group for linear in part.integer_linears})


def test_a_product_that_is_an_output_keeps_its_rank(tmp_path: Path) -> None:
    body = """(float[2,4] x) => (float[2,4] m, float[2,4] y) { c = QuantizeLinear(x, s, z)
        d = DequantizeLinear(c, s, z)  e = DequantizeLinear(w, s, z)  m = MatMul(d, e)  y = Add(m, b) }"""
    weight, bias = np.arange(16, dtype=np.int8).reshape(4, 4), np.ones(4, np.float32)
    path = write(tmp_path / "g.onnx", body, s=np.array(0.1, np.float32), z=np.array(0, np.int8), w=weight, b=bias)
    model, feeds = ir.load(path), {"x": np.eye(2, 4, dtype=np.float32)}
    common.ShapeInferencePass()(model)
    expected = run(model, tmp_path, feeds)
    lower_for_arm(model)
    found = run(model, tmp_path, feeds)

    for name in ("m", "y"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6, strict=True)


@pytest.mark.parametrize("lowering", ["model.ort-cpu.onnx", "model.ort-cpu-arm64.onnx"])
@pytest.mark.parametrize("name", GRAPHS)
def test_integer_codes_are_bit_equal_after_lowering(name: str, lowering: str, int8: Int8) -> None:
    part, folder = int8(GRAPHS[name])
    (feeds,) = inputs(build(GRAPHS[name]), 1, seed=5)
    codes = {}
    for file in ("model.onnx", lowering):
        model = ir.load(folder / file)
        expose_codes(model)
        codes[file] = run(model, folder, feeds, optimize=False)
    offset = 128 if lowering == "model.ort-cpu.onnx" else 0

    assert len(codes[lowering]) == len(codes["model.onnx"]) > 2
    for tensor, expected in codes["model.onnx"].items():
        found = codes[lowering][tensor]
        if expected.dtype == np.float32:
            np.testing.assert_array_equal(found, expected)
        else:
            assert found.dtype == (np.uint8 if offset else np.int8)
            np.testing.assert_array_equal(found.astype(np.int32).reshape(expected.shape) - offset, expected)
    assert part.part.lowered["ort-cpu"] == "model.ort-cpu.onnx"


def expose_codes(model: ir.Model) -> None:
    """Every activation's integers as an output."""
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            model.graph.outputs.append(node.outputs[0])


@pytest.mark.parametrize(("target", "file"), [("ort-cpu", "model.ort-cpu.onnx"), ("openvino-cpu", "model.onnx")])
def test_an_integer_kernel_computes_what_the_codes_say(target: str, file: str, tmp_path: Path) -> None:
    """One product on an engine's kernel against integer arithmetic in numpy: the same to float32's rounding. OpenVINO
    takes the canonical graph as it is, so its codes are those of the graph.
    """
    text = """
    one (float[1, 6, 16] x, float[16, 16] w, float[16] b) => (float[1, 6, 16] y) { p = MatMul (x, w)  y = Add (p, b) }
    """
    options = QuantizeOptions("int8", method="minmax", correct_bias=False)
    part, _ = quantized(text, tmp_path, options)
    model = build(text)
    (feeds,) = inputs(model, 1, seed=5)
    scale = part.record.ranges[0].scale
    assert scale is not None
    weight, bias = (initializer(model, name) for name in ("w", "b"))
    integers = quantize_channels(weight, options.bits)
    codes = np.clip(np.rint(feeds["x"] / np.float32(scale)), -128, 127).astype(np.int32)
    expected = (codes @ integers.values.astype(np.int32)).astype(np.float64) * scale * integers.scales + bias
    found = open_engine(tmp_path / "int8" / file, target, None).run(feeds)["y"]

    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


def initializer(model: ir.Model, name: str) -> Array:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


@pytest.mark.parametrize("text", [*GRAPHS.values(), PLAIN], ids=[*GRAPHS, "plain"])
def test_every_linear_runs_in_integer_kernels_on_onnxruntime(text: str, int8: Int8) -> None:
    part, folder = int8(text)
    (feeds,) = inputs(build(text), 1)
    found = measure_coverage("ort-cpu", folder / "model.ort-cpu.onnx", part.integer_linears, feeds)

    assert found.share == 1.0
    assert {layer.kernel for layer in found.layers} <= {"MatMulIntegerToFloat", "QLinearMatMul"}


def test_coverage_says_what_stays_float_without_lowering(int8: Int8) -> None:
    """The trap that lowering is for: onnxruntime runs the canonical form in float, and says nothing."""
    part, folder = int8(BLOCK)
    (feeds,) = inputs(build(BLOCK), 1)
    found = measure_coverage("ort-cpu", folder / "model.onnx", part.integer_linears, feeds)

    assert found.share < 0.5
    assert {layer.group for layer in found.layers if not layer.integer} >= {"w1", "w2"}


@pytest.mark.parametrize("name", ["block", "folded", "relu"])
def test_openvino_takes_the_canonical_form_as_it_is(name: str, int8: Int8) -> None:
    part, folder = int8(GRAPHS[name])
    (feeds,) = inputs(build(GRAPHS[name]), 1, seed=5)

    assert measure_coverage("openvino-cpu", folder / "model.onnx", part.integer_linears, feeds).share == 1.0


@pytest.mark.parametrize(("scheme", "quantizes"), [("int8", 6), ("int8-weights", 0), ("int4-weights", 0)])
def test_tensorrts_parser_takes_the_canonical_form(scheme: Scheme, quantizes: int, tmp_path: Path) -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    quantized(BLOCK, tmp_path, QuantizeOptions(scheme))
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    network = tensorrt.Builder(logger).create_network(0)
    parser = tensorrt.OnnxParser(network, logger)

    assert parser.parse_from_file(str(tmp_path / "int8" / "model.onnx")), parser.get_error(0)
    kinds = Counter(str(network.get_layer(index).type) for index in range(network.num_layers))
    assert kinds["LayerType.QUANTIZE"] == quantizes


def test_runs_of_one_weight_have_their_own_bias_and_range(int8: Int8) -> None:
    part, _ = int8(BLOCK)
    graph = part.models["model.onnx"].graph
    adds = {linear.name: linear for linear in part.integer_linears if linear.group == "w1"}
    biases = [linear.bias for linear in adds.values()]

    assert len({id(bias) for bias in biases}) == 2
    assert len({one.scale for one in part.record.ranges if one.name in ("n1", "n2")}) == 2
    assert sum(node.op_type == "MatMul" for node in graph) == 9


@pytest.mark.parametrize("scheme", ["int8-weights", "int4-weights"])
def test_weight_only_schemes_leave_activations_float(scheme: str, tmp_path: Path) -> None:
    options = QuantizeOptions(scheme)  # type: ignore[arg-type]
    part, path = quantized(BLOCK, tmp_path, options)
    graph = part.models["model.onnx"].graph
    model = build(BLOCK)
    (feeds,) = inputs(model, 1)
    exact = run(model, path.parent, feeds)["y"]
    found = run(part.models["model.onnx"], tmp_path / "int8", feeds)["y"]

    assert not any(node.op_type == "QuantizeLinear" for node in graph)
    assert part.part.lowered == {}
    assert sqnr(exact, found) > {"int8-weights": 35, "int4-weights": 15}[scheme]


def test_layers_may_have_schemes_of_their_own(tmp_path: Path) -> None:
    options = QuantizeOptions("int8", precision={"w?": "int8-weights", "wo": "float"})
    part, _ = quantized(BLOCK, tmp_path, options)

    assert {one.group: one.scheme for one in part.record.linears} == {
        **dict.fromkeys(("wk", "wv", "w1", "w2"), "int8-weights"),
        "wo": "float",
    }
    assert part.kept_float == {"wo": "requested"}
    assert part.integer_linears == ()


# Depths of the papers' models, and others of which blocks of 29, 23, 46, 34 and 33 were wrong.
DEPTHS = (128, 261, 322, 58, 46, 170, 66, 40)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("depth", DEPTHS)
def test_both_engines_read_the_same_weights(depth: int, rows: int, tmp_path: Path) -> None:
    text = f"""
    one (float[1, {rows}, {depth}] x, float[{depth}, 32] w, float[32] b) => (float[1, {rows}, 32] y) {{
      p = MatMul (x, w)  y = Add (p, b)
    }}
    """
    part, _ = quantized(text, tmp_path, QuantizeOptions("int4-weights"))
    (feeds,) = inputs(build(text), 1, seed=5)
    here, there = (
        open_engine(tmp_path / "int8" / "model.onnx", target, None).run(feeds)["y"]
        for target in ("ort-cpu", "openvino-cpu")
    )

    assert sqnr(here, there) > 30  # engines round activations in some kernels; a wrong block leaves less than 20
    assert part.record.linears[0].scheme == ("int4-weights" if depth in (128, 66, 40) else "int8-weights")


def test_the_trained_model_runs_on_both_engines(fashion_bundle: Path, int4_bundle: Path) -> None:
    calibration = read_calibration(open_bundle(int4_bundle))
    picture = np.random.default_rng(0).normal(size=(1, 3, 28, 28)).astype(np.float32)
    logits = []
    for target in ("ort-cpu", "openvino-cpu"):
        with load(int4_bundle, device=target) as runtime:
            logits.append(runtime.run({"image": picture})["logits"])

    assert sqnr(*logits) > 20
    assert calibration is not None
    assert calibration.how == "int4-weights; of 28 layers 2 int8-weights"  # no ranges, and no bits of integer products
    schemes = [one.scheme for one in calibration.parts["model"].linears]
    assert set(schemes) == {"int4-weights", "int8-weights"}
    assert schemes.count("int8-weights") == 2  # 261 channels, and the few of a pixel

    ranking = measure_sensitivity(
        fashion_bundle, FASHION / "held_out.npz", QuantizeOptions(samples=2, scheme="int4-weights")
    )
    assert {one.group: one.scheme for one in ranking} == {
        one.group: one.scheme for one in calibration.parts["model"].linears
    }


def test_nan_on_an_engine_is_never_published(
    fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO 2026.4 gives it for int4 blocks of 29, but not in every process: here it is put where one would be."""

    def spoiled(path: Path, target: str, *options: Any) -> Engine:
        engine = open_engine(path, target, *options)
        if target == "openvino-cpu":
            run = engine.run
            engine.run = lambda feeds, out=None: {name: values + np.nan for name, values in run(feeds, out).items()}  # type: ignore[method-assign]
        return engine

    monkeypatch.setattr("perceiver_export.calibration.quantization.engines.open_engine", spoiled)
    with pytest.raises(GateError, match="'logits' holds NaN or infinite values on openvino-cpu"):
        quantize(
            fashion_bundle,
            FASHION / "held_out.npz",
            tmp_path / "out",
            QuantizeOptions(scheme="int4-weights", samples=8),
        )
    assert not list(tmp_path.iterdir())
