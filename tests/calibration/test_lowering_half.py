# SPDX-License-Identifier: Apache-2.0
"""What stays fp32 in a 16-bit graph, on graphs of a few nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import pytest

from perceiver_export.calibration.graphs import dims, sqnr
from perceiver_export.calibration.lowering.half import DTYPES, Half, to_half
from perceiver_export.calibration.lowering.schemas import check_types
from perceiver_export.runtimes.errors import UnsupportedModelError
from tests.calibration.lint_cases import compiled, rules, run, scalar
from tests.calibration.onnx_text import write

FLOAT = np.float32
INTEGERS = np.random.default_rng(0).integers(-127, 127, (128, 128)).astype(np.int8)
NOISE = {"x": np.random.default_rng(1).normal(size=(1, 32, 128)).astype(FLOAT)}
SCORES = """(float[2,8] q, float[8,3] k, float[1,3] keep) => (float[2,8] y) {
    s = MatMul(q, k)  left = Mul(keep, lowest)  t = Add(s, left)  p = Softmax<axis = -1>(t)  y = MatMul(p, v) }"""
CANCEL = """(float[2,8] q, float[8,3] k, float[2,3] grid, float[3] inverse) => (float[2,8] y) {
    s = MatMul(q, k)  t = Add(s, grid)  u = Mul(t, inverse)  p = Softmax<axis = -1>(u)  y = MatMul(p, v) }"""


class Halved:
    """A graph of ``body`` in 16 bits: the nodes ``kept`` in fp32, and outputs before and after."""

    def __init__(
        self,
        folder: Path,
        body: str,
        hazards: dict[str, float] | None = None,
        precision: Half = "fp16",
        **constants: Any,
    ) -> None:
        self.folder, self.path = folder, write(folder / "g.onnx", body, **constants)
        self.model = ir.load(self.path)
        ir.passes.common.ShapeInferencePass()(self.model)
        self.kept = to_half(self.model, precision, hazards)
        check_types(self.model, DTYPES[precision])

    def compile(self) -> Any:
        """What TensorRT for RTX makes of it; lint finds nothing."""
        ir.save(self.model, self.folder / "lowered.onnx")
        assert rules(self.folder / "lowered.onnx", "1.7", "tensorrt-rtx") == set()
        return compiled(self.folder / "lowered.onnx")

    def outputs(self, feeds: dict[str, Any]) -> tuple[Any, Any]:
        return run(self.path, feeds), run(self.model, feeds, self.folder)


@pytest.mark.parametrize(
    ("body", "hazards", "kept"),
    [
        (SCORES, {"s": 63.0, "t": 1e30, "left": 1e30, "keep": 1.0}, ""),
        (SCORES, {"s": 65.0, "t": 1e30, "left": 1e30, "keep": 1.0}, "MatMul_0 Mul_1 Add_2 Softmax_3"),
        # Large terms of small scores count as they are scaled.
        (CANCEL, {"s": 200, "grid": 200, "t": 20, "inverse": 0.25, "u": 10}, ""),
        (CANCEL, {"s": 200, "grid": 200, "t": 20, "inverse": 0.5, "u": 10}, "MatMul_0 Add_1 Mul_2 Softmax_3"),
    ],
)
def test_large_scores_stay_fp32_and_masks_beside_them_do_not_count(
    body: str, hazards: dict[str, float], kept: str, tmp_path: Path
) -> None:
    masks: dict[str, Any] = {"lowest": scalar(-1e30, FLOAT)} if body is SCORES else {}
    half = Halved(tmp_path, body, hazards, v=np.ones((3, 8), FLOAT), **masks)

    assert set(half.kept) == set(kept.split())
    if body is SCORES:
        feeds = {"q": np.full((2, 8), 2, FLOAT), "k": np.full((8, 3), 4, FLOAT), "keep": np.zeros((1, 3), FLOAT)}
        np.testing.assert_allclose(half.outputs(feeds)[1]["y"], 1, rtol=1e-3)


def test_a_mask_hides_scores_that_are_larger_than_fp16s_mask(tmp_path: Path) -> None:
    hazards = {"s": 1e5, "t": 1e30, "left": 1e30, "keep": 1.0, "k": 12500}
    values = np.arange(24, dtype=FLOAT).reshape(3, 8)
    half = Halved(tmp_path, SCORES, hazards, lowest=scalar(-1e30, FLOAT), v=values)
    keys = np.stack([np.full(8, 12500), np.zeros(8), np.full(8, -1)], axis=1).astype(FLOAT)

    expected, found = half.outputs({"q": np.ones((2, 8), FLOAT), "k": keys, "keep": np.array([[1, 0, 0]], FLOAT)})
    np.testing.assert_allclose(found["y"], expected["y"], rtol=1e-3)


def test_indices_are_not_computed_in_fp16(tmp_path: Path) -> None:
    body = """(int32[3] i) => (int32[3] row, float[3] y)
        { f = Cast<to = 1>(i)  d = Div(f, w)  r = Floor(d)  row = Cast<to = 6>(r)  y = Mul(f, h) }"""
    half = Halved(tmp_path, body, w=scalar(224, FLOAT), h=scalar(0.5, FLOAT))
    given = np.array([50175, 2049, 4481], np.int32)

    assert set(half.kept.values()) == {"it computes an index"}
    np.testing.assert_array_equal(half.outputs({"i": given})[1]["row"], given // 224)


@pytest.mark.parametrize("precision", get_args(Half))
@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("(float[1] i) => (float[4096] y) { b = Less(grid, i)  y = Cast<to = 1>(b) }", "Less_0"),
        (
            "(int32[1] i) => (bool[4096] y) { f = Cast<to = 1>(i)  g = Mul(f, two)  y = Equal(grid, g) }",
            "Cast_0 Mul_1 Equal_2",
        ),
        (
            "(int32[1] i) => (int64[1] y) { f = Cast<to = 1>(i)  d = Sub(grid, f)  a = Abs(d)  y = ArgMin(a) }",
            "Cast_0 Sub_1 Abs_2 ArgMin_3",
        ),
    ],
)
def test_positions_are_compared_in_fp32(body: str, kept: str, precision: Half, tmp_path: Path) -> None:
    constants = {"two": scalar(2, FLOAT)} if "two" in body else {}
    half = Halved(tmp_path, body, None, precision, grid=np.arange(4096, dtype=FLOAT), **constants)
    expected, found = half.outputs({"i": np.array([2001], FLOAT if "float[1] i" in body else np.int32)})

    assert half.kept == dict.fromkeys(kept.split(), "it computes an index")
    np.testing.assert_array_equal(found["y"], expected["y"])


def test_scores_may_be_compared_in_fp16(tmp_path: Path) -> None:
    body = """(float[1,8] x, int32[1,8] keep) => (int64[1] y) { f = Cast<to = 1>(keep)  m = MatMul(x, w)  t = Mul(m, f)
        y = ArgMax<axis = 1, keepdims = 0>(t) }"""

    assert Halved(tmp_path, body, w=np.eye(8, dtype=FLOAT)).kept == {}


@pytest.mark.parametrize("precision", get_args(Half))
def test_angles_are_computed_in_fp32(precision: Half, tmp_path: Path) -> None:
    """Angles of a time step are up to 1000, where fp16 is a quarter of a radian off."""
    body = "(int32[2,1] t) => (float[2,32] y) { f = Cast<to = 1>(t)  a = MatMul(f, rates)  y = Sin(a) }"
    rates = np.exp(-np.log(10000) * np.arange(32) / 32).astype(FLOAT)[None]
    half = Halved(tmp_path, body, None, precision, rates=rates)
    expected, found = half.outputs({"t": np.array([[999], [737]], np.int32)})

    assert half.kept == dict.fromkeys(("Cast_0", "MatMul_1", "Sin_2"), "it computes an angle")
    np.testing.assert_allclose(found["y"], expected["y"], atol=1e-6)


def test_a_network_of_sines_is_computed_in_16_bits(tmp_path: Path) -> None:
    body = """(float[4,2] x) => (float[4,16] y)
        { a = MatMul(x, first)  b = Sin(a)  c = MatMul(b, second)  d = Mul(c, omega)  y = Sin(d) }"""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal(shape).astype(FLOAT) for shape in ((2, 16), (16, 16)))
    half = Halved(tmp_path, body, None, "fp16", first=first, second=second, omega=scalar(30, FLOAT))

    assert set(half.kept) == {"MatMul_0", "Sin_1", "Mul_3", "Sin_4"}


EPSILONS = {
    "Add": "n = ReduceL2(x, axes)  d = Add(n, least)  y = Div(x, d)",
    "Clip": "n = ReduceL2(x, axes)  d = Clip(n, least)  e = Expand(d, shape)  y = Div(x, e)",
    "Sqrt": "q = Mul(x, x)  n = ReduceMean(q, axes)  d = Add(n, least)  r = Sqrt(d)  s = Reciprocal(r)  y = Mul(x, s)",
    "Log": "p = Relu(x)  d = Max(p, least)  y = Log(d)",
}


@pytest.mark.parametrize("name", EPSILONS)
def test_an_epsilon_that_fp16_loses_still_divides(name: str, tmp_path: Path) -> None:
    body = f"(float[2,16] x) => (float[2,16] y) {{ {EPSILONS[name]} }}"
    constants: dict[str, Any] = {"axes": np.array([1]), "shape": np.array([2, 16])}
    constants = {key: array for key, array in constants.items() if key in body}
    half = Halved(tmp_path, body, least=scalar(1e-12, FLOAT), **constants)
    expected, found = half.outputs({"x": np.stack([np.zeros(16), np.ones(16)]).astype(FLOAT)})

    assert "fp16 loses its epsilon" in half.kept.values()
    np.testing.assert_allclose(found["y"], expected["y"], rtol=1e-3)


@pytest.mark.parametrize("body", ["y = Add(x, bias)", "d = Add(x, usual)  y = Div(x, d)"])
def test_other_small_constants_are_no_epsilons(body: str, tmp_path: Path) -> None:
    constants: dict[str, Any] = {"bias": np.array([1e-8, 0, 0, 0], FLOAT), "usual": scalar(1e-5, FLOAT)}
    constants = {name: array for name, array in constants.items() if name in body}

    assert Halved(tmp_path, f"(float[1,4] x) => (float[1,4] y) {{ {body} }}", **constants).kept == {}


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ('(float[1,3,4,4] x) => (float[1,3,8,8] y) { y = Resize<mode = "nearest">(x, , scales) }', ""),
        ("(float[2,2] x) => (float[2,2] y) { c = ConstantOfShape<value = float[1] {2.0}>(size)  y = Add(x, c) }", "c"),
        ("(float[2,2] x) => (float[2,2] y) { c = EyeLike<dtype = 1>(x)  y = Add(x, c) }", "c"),
        ("(float[1] x) => (float[4] y) { c = Range(start, limit, delta)  y = Add(x, c) }", "c"),
        ("(float[1,6,4] x, float[1,1,6] p) => (int64[n,3] y) { y = NonMaxSuppression(x, p, most) }", ""),
    ],
)
def test_types_are_those_that_onnx_allows(body: str, kept: str, tmp_path: Path) -> None:
    """`Halved` checks that the graph is valid."""
    constants: dict[str, Any] = {"scales": np.array([1, 1, 2, 2], FLOAT), "size": np.array([2, 2]), "most": np.array(5)}
    constants |= {"start": scalar(0, FLOAT), "limit": scalar(4, FLOAT), "delta": scalar(1, FLOAT)}
    half = Halved(tmp_path, body, **{name: array for name, array in constants.items() if name in body})
    feeds = {str(value.name): np.ones(dims(value), FLOAT) for value in half.model.graph.inputs}
    expected, found = half.outputs(feeds)

    assert set(half.kept.values()) == ({"its type is fixed"} if kept else set())
    np.testing.assert_array_equal(found["y"], expected["y"])


def test_types_that_onnx_does_not_allow_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "g.onnx", "(float16 a) => (float16[n] y) { y = Range(a, a, a) }")

    with pytest.raises(UnsupportedModelError, match="is not valid"):
        check_types(ir.load(path), DTYPES["fp16"])


def test_sums_of_more_terms_than_fp16_counts_stay_fp32(tmp_path: Path) -> None:
    half = Halved(tmp_path, "(float[1,70000] x) => (float[1,70000] y) { y = Softmax<axis = -1>(x) }")

    assert half.kept == {"Softmax_0": "it sums 70000 terms"}
    np.testing.assert_allclose(half.outputs({"x": np.zeros((1, 70000), FLOAT)})[1]["y"], 1 / 70000, rtol=1e-3)


def test_scales_too_small_for_fp16_stay_fp32(tmp_path: Path) -> None:
    body = """(float[1,4] x) => (float[1,4] y)
        { c = QuantizeLinear(x, s, z)  d = DequantizeLinear(c, s, z)  y = Add(d, x) }"""
    half = Halved(tmp_path, body, s=scalar(1e-6, FLOAT), z=scalar(0, np.int8))

    assert half.kept == dict.fromkeys(("QuantizeLinear_0", "DequantizeLinear_1"), "its scale is 1e-06")


def test_products_of_integers_have_scales_of_one_type(tmp_path: Path) -> None:
    """TensorRT for RTX 1.7.1 stops with a type mismatch where one scale is fp16 and the other fp32."""
    body = """(float[1,32,128] x) => (float[1,32,128] y) { c = QuantizeLinear(x, s, z)  d = DequantizeLinear(c, s, z)
        e = DequantizeLinear<axis = 1>(w, t)  f = DequantizeLinear<axis = 1>(w, u)  a = MatMul(d, e)  b = MatMul(d, f)
        y = Add(a, b) }"""
    scales: dict[str, Any] = {"t": np.full(128, 1e-6, FLOAT), "u": np.full(128, 1e-2, FLOAT), "s": scalar(0.02, FLOAT)}
    half = Halved(tmp_path, body, w=INTEGERS, z=scalar(0, np.int8), **scales)

    assert set(half.kept) == {"DequantizeLinear_2", "MatMul_4", "MatMul_5"}
    assert half.compile().int8_products == 2
    assert sqnr(*(side["y"] for side in half.outputs(NOISE))) > 50


def test_weights_alone_keep_scales_that_16_bits_would_lose(tmp_path: Path) -> None:
    """A scale of 1e-8 is 0 in fp16, which TensorRT refuses; the weights that are made with it are not all 0."""
    body = """(float[1,32,128] x) => (float[1,32,128] y) { e = DequantizeLinear<axis = 1>(w, t)  a = MatMul(x, e)
        y = Mul(a, large) }"""
    scales = np.where(np.arange(128) % 2, 1e-2, 1e-8).astype(FLOAT)
    half = Halved(tmp_path, body, w=INTEGERS, t=scales, large=1 / scales)

    assert half.kept == {"DequantizeLinear_0": "its scale is 1e-08", "Mul_2": "|large| reaches 1e+08"}
    assert half.compile().precisions == {"fp16": 1}
    assert sqnr(*(side["y"] for side in half.outputs(NOISE))) > 30
