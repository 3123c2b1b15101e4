# SPDX-License-Identifier: Apache-2.0
"""Each rule of lint on the smallest graph that breaks it, and TensorRT for RTX's own verdict on that graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from perceiver_export.calibration.lint_operators import MORE, NEVER, SINCE
from perceiver_export.calibration.linting import lint
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.engines.tensorrt import import_library
from perceiver_export.runtimes.engines.tensorrt_build import make_logger
from tests.calibration.lint_cases import (
    ATTENTION,
    RNG,
    compiled,
    int8_linear,
    partly_int8_attention,
    refused,
    rules,
    scalar,
)
from tests.calibration.onnx_text import write


def test_what_we_write_has_no_finding_and_runs_as_it_says(tmp_path: Path) -> None:
    attention, linear = write(tmp_path / "a.onnx", ATTENTION.format(qk=64, v=64)), int8_linear(tmp_path / "l.onnx")

    assert rules(attention) == rules(linear) == set()
    assert compiled(attention).fused_attentions == 1
    assert compiled(linear).int8_products == 1


@pytest.mark.parametrize(
    ("qk", "v", "rule"), [(32, 160, "heads"), (4, 4, "heads"), (261, 261, "wide-heads"), (512, 512, "wide-heads")]
)
def test_heads_that_do_not_fuse(qk: int, v: int, rule: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", ATTENTION.format(qk=qk, v=v))

    assert rules(path) == {rule}
    assert compiled(path).fused_attentions == 0


@pytest.mark.parametrize("width", [9, 16, 65, 255])
def test_heads_that_do(width: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", ATTENTION.format(qk=width, v=width))

    assert rules(path) == set()
    assert compiled(path).fused_attentions == 1


def test_attention_in_fp32_is_not_fused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", ATTENTION.format(qk=64, v=64).replace("float16", "float"))

    assert rules(path) == {"fp32-attention"}
    assert "fp32-attention" not in rules(path, "8.6")  # there types are not in the graph
    assert compiled(path, "fp32").fused_attentions == 0


def test_attention_that_is_partly_int8_is_not_fused(tmp_path: Path) -> None:
    path = partly_int8_attention(tmp_path / "a.onnx")

    assert rules(path) == {"partial-attention"}
    assert compiled(path).fused_attentions == 0


def test_weights_with_a_scale_for_each_input_are_not_int8(tmp_path: Path) -> None:
    path = int8_linear(tmp_path / "l.onnx", axis=0)

    assert rules(path) == {"weight-axis"}
    assert "int8 asked, fp16 found" in refused(path)  # it compiles, and the check of precision stops it


def test_an_int8_input_of_a_float_weight_is_not_int8(tmp_path: Path) -> None:
    body = """(float16[1,64,128] x) => (float16[1,64,128] y)
        { c = QuantizeLinear(x, s, z)  d = DequantizeLinear(c, s, z)  y = MatMul(d, w) }"""
    weight = RNG.standard_normal((128, 128)).astype(np.float16)
    path = write(tmp_path / "l.onnx", body, s=scalar(0.05), z=scalar(0, np.int8), w=weight)

    assert rules(path) == {"one-sided"}
    assert compiled(path).int8_products == 0


@pytest.mark.parametrize(("zero", "kind", "rule"), [(3, np.int8, "zero-point"), (128, np.uint8, "uint8")])
def test_integers_that_are_not_symmetric_int8_are_refused(zero: int, kind: Any, rule: str, tmp_path: Path) -> None:
    path = int8_linear(tmp_path / "l.onnx", zero=zero, kind=kind)

    assert rules(path) == {rule}
    assert refused(path)


def test_uint8_from_0_on_would_be_read_as_int8(tmp_path: Path) -> None:
    """TensorRT for RTX 1.7 warns and goes on, with other numbers."""
    assert rules(int8_linear(tmp_path / "l.onnx", kind=np.uint8)) == {"uint8"}


def test_a_dequantized_int32_bias_is_refused(tmp_path: Path) -> None:
    body = """(float16[1,64,128] x) => (float16[1,64,128] y)
        { m = MatMul(x, w)  b = DequantizeLinear(c, s, z)  y = Add(m, b) }"""
    path = write(
        tmp_path / "l.onnx",
        body,
        w=RNG.standard_normal((128, 128)).astype(np.float16),
        c=np.arange(128, dtype=np.int32),
        s=scalar(0.01),
        z=scalar(0, np.int32),
    )

    assert rules(path) == {"int32-bias"}
    assert refused(path)


def test_a_scale_of_another_type_is_not_onnx(tmp_path: Path) -> None:
    body = """(float16[1,64,128] x) => (float16[1,64,128] y)
        { c = QuantizeLinear(x, s, z)  d = DequantizeLinear(c, t, z)  y = Identity(d) }"""
    path = write(tmp_path / "l.onnx", body, s=scalar(0.05, np.float32), t=scalar(0.05), z=scalar(0, np.int8))

    assert rules(path) == {"scale-type"}
    with pytest.raises(onnx.shape_inference.InferenceError, match="inconsistent type"):
        onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize(
    ("operator", "body"),
    [
        ("MatMulInteger", "(int8[4,8] x, int8[8,4] y) => (int32[4,4] z) { z = MatMulInteger(x, y) }"),
        (
            "DynamicQuantizeLinear",
            "(float[4,8] x) => (uint8[4,8] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }",
        ),
    ],
)
def test_operators_that_no_version_has_are_refused(operator: str, body: str, tmp_path: Path) -> None:
    path = write(tmp_path / "o.onnx", body)

    assert "operator" in rules(path)
    assert operator in refused(path, "fp32")


INNER = """(float[4,4] x) => (float[4,4] y) {
    n = Constant<value = int64 {2}>()  c = Constant<value = bool {1}>()
    y = Loop(n, c, x) <body = b (int64 i, bool p, float[4,4] a) => (bool q, float[4,4] z)
        { q = Identity(p)  z = Det(a) }> }"""


@pytest.mark.parametrize(
    ("operator", "body"),
    [
        ("BitShift", '(int32[4] x) => (int32[4] y) { y = BitShift<direction = "LEFT">(x, x) }'),
        ("SequenceConstruct", "(float[4] x) => (float[4] y) { s = SequenceConstruct(x)  y = SequenceAt(s, i) }"),
        ("Det", INNER),
        ("FusedMatMul", "(float[4,4] x) => (float[4,4] y) { y = com.microsoft.FusedMatMul(x, x) }"),
        ("Mine", "(float[4,4] x) => (float[4,4] y) { y = mine.Mine(x) }"),
    ],
)
def test_operators_that_are_not_onnx_or_not_tensorrt_are_refused(operator: str, body: str, tmp_path: Path) -> None:
    path = write(tmp_path / "o.onnx", body, i=np.array(0, np.int64))

    assert rules(path) == rules(path, "8.6") - {"opset"} == {"operator"}
    assert operator in refused(path, "fp32")


def test_names_decide_and_not_domains_and_functions_are_looked_into(tmp_path: Path) -> None:
    body = "(float[4,4] x) => (float[4,4] y) {{ y = {operator}(x) }}"
    called = '{body} <domain: "mine", opset_import: ["": 20]> Call (a) => (b) {{ b = {inside}(a) }}'
    gelu, good, bad = (
        write(tmp_path / f"{name}.onnx", text)
        for name, text in (
            ("gelu", body.format(operator="com.microsoft.Gelu")),
            ("good", called.format(body=body.format(operator="mine.Call"), inside="Relu")),
            ("bad", called.format(body=body.format(operator="mine.Call"), inside="Det")),
        )
    )

    assert rules(gelu) == rules(good) == set()
    assert rules(bad) == {"operator"}
    compiled(gelu, "fp32")
    compiled(good, "fp32")
    assert "Det" in refused(bad, "fp32")


def test_every_operator_that_no_version_has_is_unknown_to_the_parser() -> None:
    trt = import_library("tensorrt-rtx")
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    parser = trt.OnnxParser(builder.create_network(0), logger)

    assert not [name for name in NEVER if parser.supports_operator(name)]
    assert [name for name in ("Gelu", *SINCE, *MORE) if not parser.supports_operator(name)] == []


SHARED = """({kind}[1,32,128] x) => ({kind}[1,32,128] y) {{
    d = DequantizeLinear<axis = 1>(w, s)  e = DequantizeLinear<axis = 1>(v, s)
    a = LayerNormalization(x, g)  b = MatMul(a, d)  c = {second}  m = Add(b, c)
    h = LayerNormalization(m, g)  i = MatMul(h, d)  j = MatMul(h, e)  y = Add(i, j) }}"""


def shared(path: Path, second: str = "MatMul(a, e)", kind: str = "float16") -> Path:
    """Two products of one input, twice, whose weights alone are int8."""
    floats = ml_dtypes.bfloat16 if kind == "bfloat16" else np.float16
    weights = {name: RNG.integers(-127, 127, (128, 128)).astype(np.int8) for name in "wv"}
    ones = {"s": np.full(128, 0.01, floats), "g": np.ones(128, floats)}
    return write(path, SHARED.format(second=second, kind=kind), 20, **weights, **ones)


def test_weights_alone_in_int8_that_blocks_share_crash_rtx_and_are_refused_before(tmp_path: Path) -> None:
    """Without the check TensorRT for RTX 1.7.1 ends the process with a segmentation fault."""
    path = shared(tmp_path / "s.onnx")

    assert rules(path, "1.7", "tensorrt-rtx") == {"shared-weights"}
    assert rules(path, "11.4") == set()  # of TensorRT itself nobody knows
    assert "crash its compiler" in refused(path)


def test_those_whose_scales_stay_fp32_are_refused_too(tmp_path: Path) -> None:
    """A Cast of the weights behind them changes nothing: it crashes too."""
    body = SHARED.format(second="MatMul(a, e)", kind="float16")
    for name, weight in (("d", "w"), ("e", "v")):
        made = f"DequantizeLinear<axis = 1>({weight}, s)"
        body = body.replace(f"{name} = {made}", f"{name}f = {made}  {name} = Cast<to = 10>({name}f)")
    weights = {name: RNG.integers(-127, 127, (128, 128)).astype(np.int8) for name in "wv"}
    path = write(tmp_path / "c.onnx", body, 20, **weights, s=np.full(128, 1e-6, np.float32), g=np.ones(128, np.float16))

    assert rules(path, "1.7", "tensorrt-rtx") == {"shared-weights"}
    assert "crash its compiler" in refused(path)


@pytest.mark.parametrize(("second", "kind"), [("Tanh(a)", "float16"), ("MatMul(a, e)", "bfloat16")])
def test_those_that_do_not_crash_are_compiled(second: str, kind: str, tmp_path: Path) -> None:
    path = shared(tmp_path / "s.onnx", second, kind)

    assert rules(path, "1.7", "tensorrt-rtx") == set()
    assert compiled(path, "bf16" if kind == "bfloat16" else "fp16").int8_products == 0


def test_operators_are_known_by_version(tmp_path: Path) -> None:
    gelu = write(tmp_path / "g.onnx", "(float[4] x) => (float[4] y) { y = Gelu(x) }")

    assert rules(gelu, "8.6") == {"operator", "opset"}
    assert rules(gelu, "10.3") == set()
    norm = write(tmp_path / "n.onnx", "(float[4] x) => (float[4] y) { y = RMSNormalization(x, x) }", opset=23)
    assert rules(norm, "10.14") == {"operator"}
    assert rules(norm, "10.15") == rules(norm, "1.7", "tensorrt-rtx") == set()


def test_the_operator_attention_wants_equal_widths_and_a_kernel(tmp_path: Path) -> None:
    body = "(float16[1,8,64,{qk}] q, float16[1,8,64,{qk}] k, float16[1,8,64,{v}] v) => (float16[1,8,64,{v}] y)"
    body += " {{ y = Attention(q, k, v) }}"
    equal, unequal = (
        write(tmp_path / f"{qk}-{v}.onnx", body.format(qk=qk, v=v), opset=23) for qk, v in ((64, 64), (32, 160))
    )

    assert rules(equal) == set()
    assert rules(unequal) == {"attention-operator"}
    assert rules(equal, "10.13") == {"operator"}
    assert rules(equal, "10.3") == {"operator", "opset"}
    compiled(equal)
    assert refused(unequal)


@pytest.mark.parametrize(
    ("width", "kind", "queries", "compiles"),
    [
        (8, "float16", 64, False),
        (9, "float16", 64, True),
        (256, "float16", 64, True),
        (257, "float16", 64, False),
        (64, "float", 64, False),
        (64, "bfloat16", 64, True),
        (8, "float16", 1, True),  # of one query any width, and fp32
        (64, "float", 1, True),
    ],
)
def test_the_operator_attention_compiles_where_it_has_a_kernel(
    width: int, kind: str, queries: int, compiles: bool, tmp_path: Path
) -> None:
    q, kv = f"{kind}[1,8,{queries},{width}]", f"{kind}[1,8,64,{width}]"
    path = write(tmp_path / "a.onnx", f"({q} q, {kv} k, {kv} v) => ({q} y) {{ y = Attention(q, k, v) }}", opset=23)
    precision: Precision = {"float16": "fp16", "bfloat16": "bf16", "float": "fp32"}[kind]  # type: ignore[assignment]

    assert rules(path) == (set() if compiles else {"attention-operator"})
    if compiles:
        compiled(path, precision)
    else:
        assert "dedicated kernel" in refused(path, precision)


def test_a_dimension_without_a_range_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.onnx", "(float16[N,64] x) => (float16[N,64] y) { y = Tanh(x) }")

    assert rules(path) == {"no-profile"}
    assert refused(path)


def test_a_file_in_no_bundle_is_not_sent_to_options_of_bundles(tmp_path: Path) -> None:
    path = write(tmp_path / "d.onnx", "(float16[N,64] x) => (float16[N,64] y) { y = Tanh(x) }")
    findings = lint(path, version="8.6")[0].findings

    fixes = {finding.rule: finding.fix for finding in findings}
    assert fixes["opset"] == "export it with opset 17"
    assert "--minShapes" in fixes["no-profile"]
    assert not any(fix.startswith("perceiver-export") or "--batch" in fix for fix in fixes.values())


def test_more_than_eight_axes_are_refused(tmp_path: Path) -> None:
    body = "(float16[1,2,1,2,1,2,1,2,2] x) => (float16[1,2,1,2,1,2,1,2,2] y) { y = Tanh(x) }"
    path = write(tmp_path / "n.onnx", body)

    assert rules(path) == {"axes"}
    assert refused(path)


def test_what_overflows_fp16_is_told(tmp_path: Path) -> None:
    infinite = write(
        tmp_path / "i.onnx",
        "(float16[1,64] x) => (float16[1,64] y) { y = Add(x, c) }",
        c=np.array([np.inf], np.float16),
    )
    deep = write(tmp_path / "s.onnx", "(float16[1,70000] x) => (float16[1,70000] y) { y = Softmax<axis = -1>(x) }")

    assert rules(infinite) == rules(deep) == {"overflow"}


def test_8_cuts_integers_off_at_32_bits(tmp_path: Path) -> None:
    """It has no int64; no such version can be asked here."""
    added = "(int64[2] x) => (int64[2] y) { y = Add(x, c) }"
    cut = "(float[4] x) => (float[4] y) { y = Slice(x, s, c) }"
    large, small, end = (
        write(tmp_path / f"{name}.onnx", body, 17, c=np.array([number], np.int64), s=np.array([0], np.int64))
        for name, body, number in (("large", added, 2**40), ("small", added, 7), ("end", cut, 2**63 - 1))
    )

    assert rules(large, "8.6") == {"int64"}
    assert rules(small, "8.6") == rules(end, "8.6") == rules(large, "10.3") == set()


def test_8_takes_types_from_flags_and_fp32_scales(tmp_path: Path) -> None:
    path = int8_linear(tmp_path / "l.onnx")

    assert rules(path, "8.6") == {"types", "scale-type", "opset"}


def test_a_newer_opset_than_a_version_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "o.onnx", "(float16[4] x) => (float16[4] y) { y = Tanh(x) }", opset=22)

    assert rules(path, "10.3") == {"opset"}
    assert rules(path, "10.9") == set()
