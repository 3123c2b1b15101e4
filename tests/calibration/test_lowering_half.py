# SPDX-License-Identifier: Apache-2.0
"""What stays fp32 in a 16-bit graph, on graphs of a few nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import pytest

from perceiver_export.calibration.lowering.half import to_half
from perceiver_export.calibration.lowering.tensorrt import lower_for_tensorrt
from perceiver_export.calibration.lowering.tensorrt_bundle import sqnr
from tests.calibration.lint_cases import compiled, refused, rules
from tests.calibration.onnx_text import write
from tests.calibration.reference_runs import run

INTEGERS = np.random.default_rng(0).integers(-127, 127, (128, 128)).astype(np.int8)
SCORES = """(float[2,8] q, float[8,3] k, float[1,3] keep) => (float[2,8] y) {
    s = MatMul(q, k)  left = Mul(keep, lowest)  t = Add(s, left)  p = Softmax<axis = -1>(t)  y = MatMul(p, v) }"""


@pytest.mark.parametrize(("largest", "kept"), [(63.0, set()), (65.0, {"MatMul_0", "Mul_1", "Add_2", "Softmax_3"})])
def test_large_scores_are_seen_beside_a_mask(largest: float, kept: set[str], tmp_path: Path) -> None:
    path = write(tmp_path / "s.onnx", SCORES, lowest=np.array(-1e30, np.float32), v=np.ones((3, 8), np.float32))
    model = ir.load(path)
    ir.passes.common.ShapeInferencePass()(model)

    assert set(to_half(model, "fp16", {"s": largest, "t": 1e30, "left": 1e30, "keep": 1.0})) == kept
    feeds = {
        "q": np.full((2, 8), 2, np.float32),
        "k": np.full((8, 3), 4, np.float32),
        "keep": np.zeros((1, 3), np.float32),
    }
    np.testing.assert_allclose(run(model, feeds, tmp_path)["y"], 1, rtol=1e-3)


def test_a_mask_hides_scores_that_are_larger_than_fp16s_mask(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(3, 8)
    path = write(tmp_path / "s.onnx", SCORES, lowest=np.array(-1e30, np.float32), v=values)
    model = ir.load(path)
    ir.passes.common.ShapeInferencePass()(model)
    keys = np.stack([np.full(8, 12500), np.zeros(8), np.full(8, -1)], axis=1).astype(np.float32)
    feeds = {"q": np.ones((2, 8), np.float32), "k": keys, "keep": np.array([[1, 0, 0]], np.float32)}

    to_half(model, "fp16", {"s": 1e5, "t": 1e30, "left": 1e30, "keep": 1.0, "k": 12500})
    np.testing.assert_allclose(run(model, feeds, tmp_path)["y"], run(path, feeds)["y"], rtol=1e-3)


CANCEL = """(float[2,8] q, float[8,3] k, float[2,3] grid, float[3] inverse) => (float[2,8] y) {
    s = MatMul(q, k)  t = Add(s, grid)  u = Mul(t, inverse)  p = Softmax<axis = -1>(u)  y = MatMul(p, v) }"""


@pytest.mark.parametrize(("inverse", "kept"), [(0.25, set()), (0.5, {"MatMul_0", "Add_1", "Mul_2", "Softmax_3"})])
def test_large_terms_of_small_scores_count_as_they_are_scaled(inverse: float, kept: set[str], tmp_path: Path) -> None:
    model = ir.load(write(tmp_path / "c.onnx", CANCEL, v=np.ones((3, 8), np.float32)))
    ir.passes.common.ShapeInferencePass()(model)

    assert set(to_half(model, "fp16", {"s": 200, "grid": 200, "t": 20, "inverse": inverse, "u": 10})) == kept


def test_indices_are_not_computed_in_fp16(tmp_path: Path) -> None:
    body = """(int32[3] i) => (int32[3] row, float[3] y)
        { f = Cast<to = 1>(i)  d = Div(f, w)  r = Floor(d)  row = Cast<to = 6>(r)  y = Mul(f, h) }"""
    path = write(tmp_path / "i.onnx", body, w=np.array(224, np.float32), h=np.array(0.5, np.float32))
    model = ir.load(path)
    ir.passes.common.ShapeInferencePass()(model)
    kept = to_half(model, "fp16")

    given = np.array([50175, 2049, 4481], np.int32)
    assert set(kept.values()) == {"it computes an index"}
    np.testing.assert_array_equal(run(model, {"i": given}, tmp_path)["row"], given // 224)


def test_sums_of_more_terms_than_fp16_counts_stay_fp32(tmp_path: Path) -> None:
    path = write(tmp_path / "s.onnx", "(float[1,70000] x) => (float[1,70000] y) { y = Softmax<axis = -1>(x) }")
    model = ir.load(path)

    assert to_half(model, "fp16") == {"Softmax_0": "it sums 70000 terms"}
    np.testing.assert_allclose(run(model, {"x": np.zeros((1, 70000), np.float32)}, tmp_path)["y"], 1 / 70000, rtol=1e-3)


def test_scales_too_small_for_fp16_stay_fp32(tmp_path: Path) -> None:
    body = """(float[1,4] x) => (float[1,4] y)
        { c = QuantizeLinear(x, s, z)  d = DequantizeLinear(c, s, z)  y = Add(d, x) }"""
    path = write(tmp_path / "q.onnx", body, s=np.array(1e-6, np.float32), z=np.array(0, np.int8))
    model = ir.load(path)
    ir.passes.common.ShapeInferencePass()(model)

    assert to_half(model, "fp16") == dict.fromkeys(("QuantizeLinear_0", "DequantizeLinear_1"), "its scale is 1e-06")


def test_products_of_integers_have_scales_of_one_type(tmp_path: Path) -> None:
    """TensorRT for RTX 1.7.1 stops with a type mismatch where one scale is fp16 and the other fp32."""
    body = """(float[1,32,128] x) => (float[1,32,128] y) { c = QuantizeLinear(x, s, z)  d = DequantizeLinear(c, s, z)
        e = DequantizeLinear<axis = 1>(w, t)  f = DequantizeLinear<axis = 1>(w, u)  a = MatMul(d, e)  b = MatMul(d, f)
        y = Add(a, b) }"""
    t, u, s = np.full(128, 1e-6, np.float32), np.full(128, 1e-2, np.float32), np.array(0.02, np.float32)
    path = write(tmp_path / "p.onnx", body, w=INTEGERS, z=np.array(0, np.int8), t=t, u=u, s=s)
    model = ir.load(path)
    ir.passes.common.ShapeInferencePass()(model)
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 32, 128)).astype(np.float32)}
    expected = run(path, feeds)["y"]

    for_8 = lower_for_tensorrt(model.clone(), "tensorrt8", "fp16")
    assert set(for_8) == {"DequantizeLinear_2"}  # all scales are fp32 there, and constraints would undo int8
    assert set(to_half(model, "fp16")) == {"DequantizeLinear_2", "MatMul_4", "MatMul_5"}
    ir.save(model, tmp_path / "lowered.onnx")
    assert rules(tmp_path / "lowered.onnx", "1.7", "tensorrt-rtx") == set()
    assert compiled(tmp_path / "lowered.onnx").int8_products == 2
    assert sqnr(expected, run(model, feeds, tmp_path)["y"]) > 50


@pytest.mark.parametrize(
    "products",
    [
        "f = Cast<to = 10>(e)  a = MatMul(d, f)  y = Cast<to = 1>(a)",
        "f = DequantizeLinear<axis = 1>(w, u)  g = DequantizeLinear(c, r, z)  a = MatMul(g, e)  b = MatMul(d, f)"
        "  h = Cast<to = 1>(b)  y = Add(a, h)",
    ],
    ids=["of one product", "of two that read one tensor"],
)
def test_scales_of_two_types_do_not_compile(products: str, tmp_path: Path) -> None:
    body = f"""(float16[1,32,128] x) => (float[1,32,128] y) {{ c = QuantizeLinear(x, s, z)
        d = DequantizeLinear(c, s, z)  e = DequantizeLinear<axis = 1>(w, t)  {products} }}"""
    t, u = np.full(128, 1e-2, np.float32), np.full(128, 1e-2, np.float16)
    s, r = np.array(0.02, np.float16), np.array(0.02, np.float32)
    path = write(tmp_path / "p.onnx", body, w=INTEGERS, z=np.array(0, np.int8), t=t, s=s, u=u, r=r)

    assert rules(path, "1.7", "tensorrt-rtx") == {"scale-type"}
    assert "type" in refused(path).partition("could not compile")[2]


def test_weights_alone_keep_scales_that_16_bits_would_lose(tmp_path: Path) -> None:
    """A scale of 1e-8 is 0 in fp16, which TensorRT refuses; the weights that are made with it are not all 0."""
    body = """(float[1,32,128] x) => (float[1,32,128] y) { e = DequantizeLinear<axis = 1>(w, t)  a = MatMul(x, e)
        y = Mul(a, large) }"""
    scales = np.where(np.arange(128) % 2, 1e-2, 1e-8).astype(np.float32)
    path = write(tmp_path / "p.onnx", body, w=INTEGERS, t=scales, large=1 / scales)
    model = ir.load(path)
    ir.passes.common.ShapeInferencePass()(model)
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 32, 128)).astype(np.float32)}
    expected = run(path, feeds)["y"]

    assert to_half(model, "fp16") == {"DequantizeLinear_0": "its scale is 1e-08", "Mul_2": "|large| reaches 1e+08"}
    ir.save(model, tmp_path / "lowered.onnx")
    assert rules(tmp_path / "lowered.onnx", "1.7", "tensorrt-rtx") == set()
    assert compiled(tmp_path / "lowered.onnx").precisions == {"fp16": 1}
    assert sqnr(expected, run(model, feeds, tmp_path)["y"]) > 30
