# SPDX-License-Identifier: Apache-2.0
"""Lint: each rule on the smallest graph that breaks it, with TensorRT for RTX's own verdict, and what it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import pytest

from perceiver_export.calibration import lint
from perceiver_export.calibration.lowering.lint import (
    FOLDED,
    FP32,
    MORE,
    NEVER,
    NOT_LOWERED,
    ONE_QUERY,
    PART_INT8,
    SINCE,
)
from perceiver_export.calibration.lowering.tensorrt import lower_for_tensorrt
from perceiver_export.exporter.cli.engines import show_lint
from perceiver_export.runtimes.engines.tensorrt import import_library
from perceiver_export.runtimes.engines.tensorrt_build import make_logger
from perceiver_export.runtimes.errors import BundleError, DeviceError, UsageError
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


@pytest.mark.parametrize(
    ("qk", "v", "kind", "rule"),
    [
        (9, 9, "float16", None),
        (65, 65, "float16", None),
        (255, 255, "float16", None),
        (32, 160, "float16", "heads"),
        (4, 4, "float16", "heads"),
        (261, 261, "float16", "wide-heads"),
        (64, 64, "float", "fp32-attention"),
    ],
)
def test_attention_fuses_where_no_rule_is_broken(qk: int, v: int, kind: str, rule: str | None, tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", ATTENTION.format(qk=qk, v=v).replace("float16", kind))

    assert rules(path) == ({rule} if rule else set())
    assert compiled(path, "fp16" if kind == "float16" else "fp32").fused_attentions == (0 if rule else 1)


def test_attention_that_is_partly_int8_is_not_fused(tmp_path: Path) -> None:
    path = partly_int8_attention(tmp_path / "a.onnx")

    assert rules(path) == {"partial-attention"}
    assert lint(path)[0].unfused == {"Softmax_5": PART_INT8}
    assert compiled(path).fused_attentions == 0


def test_int8_as_we_write_it_has_no_finding_and_other_int8_runs_in_floats(tmp_path: Path) -> None:
    body = """(float16[1,64,128] x) => (float16[1,64,128] y)
        { c = QuantizeLinear(x, s, z)  d = DequantizeLinear(c, s, z)  y = MatMul(d, w) }"""
    weight = RNG.standard_normal((128, 128)).astype(np.float16)
    one_sided = write(tmp_path / "o.onnx", body, s=scalar(0.05), z=scalar(0, np.int8), w=weight)
    ours, by_input = int8_linear(tmp_path / "l.onnx"), int8_linear(tmp_path / "i.onnx", axis=0)

    assert (rules(ours), compiled(ours).int8_products) == (set(), 1)
    assert (rules(one_sided), compiled(one_sided).int8_products) == ({"one-sided"}, 0)
    assert rules(by_input) == {"weight-axis"}
    assert "int8 requested, fp16 found" in refused(by_input)  # it compiles, and the check of precision stops it


@pytest.mark.parametrize(("zero", "kind", "wrong"), [(3, np.int8, False), (128, np.uint8, False), (0, np.uint8, True)])
def test_integers_that_are_not_symmetric_int8_are_refused(zero: int, kind: Any, wrong: bool, tmp_path: Path) -> None:
    """TensorRT for RTX 1.7 takes uint8 from 0 on for int8: it warns and goes on, with other numbers."""
    path = int8_linear(tmp_path / "l.onnx", zero=zero, kind=kind)

    assert rules(path) == {"symmetric"}
    assert wrong or refused(path)


INNER = """(float[4,4] x) => (float[4,4] y) {
    n = Constant<value = int64 {2}>()  c = Constant<value = bool {1}>()
    y = Loop(n, c, x) <body = b (int64 i, bool p, float[4,4] a) => (bool q, float[4,4] z)
        { q = Identity(p)  z = Det(a) }> }"""
CALL = '(float[4,4] x) => (float[4,4] y) { y = mine.Call(x) } <domain: "mine", opset_import: ["": 20]> Call (a) => (b)'


@pytest.mark.parametrize(
    ("operator", "body"),
    [
        ("MatMulInteger", "(int8[4,8] x, int8[8,4] y) => (int32[4,4] z) { z = MatMulInteger(x, y) }"),
        ("BitShift", '(int32[4] x) => (int32[4] y) { y = BitShift<direction = "LEFT">(x, x) }'),
        ("Det", INNER),
        ("Det", f"{CALL} {{ b = Det(a) }}"),
        ("FusedMatMul", "(float[4,4] x) => (float[4,4] y) { y = com.microsoft.FusedMatMul(x, x) }"),
        ("Mine", "(float[4,4] x) => (float[4,4] y) { y = mine.Mine(x) }"),
        ("", "(float[4,4] x) => (float[4,4] y) { y = com.microsoft.Gelu(x) }"),  # names decide and not domains
        ("", f"{CALL} {{ b = Relu(a) }}"),
    ],
)
def test_operators_that_tensorrt_lacks_are_refused(operator: str, body: str, tmp_path: Path) -> None:
    path = write(tmp_path / "o.onnx", body)

    assert rules(path) == ({"operator"} if operator else set())
    if operator:
        assert operator in refused(path, "fp32")
    else:
        compiled(path, "fp32")


def test_every_operator_that_no_version_has_is_unknown_to_the_parser() -> None:
    trt = import_library("tensorrt-rtx")
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    parser = trt.OnnxParser(builder.create_network(0), logger)

    assert not [name for name in NEVER if parser.supports_operator(name)]
    assert [name for name in ("Gelu", *SINCE, *MORE) if not parser.supports_operator(name)] == []


def test_operators_and_opsets_are_known_by_version(tmp_path: Path) -> None:
    norm = write(tmp_path / "n.onnx", "(float[4] x) => (float[4] y) { y = RMSNormalization(x, x) }", opset=23)
    newer = write(tmp_path / "o.onnx", "(float16[4] x) => (float16[4] y) { y = Tanh(x) }", opset=22)

    assert rules(norm, "10.14") == {"operator"}
    assert rules(norm, "10.15") == rules(norm, "1.7", "tensorrt-rtx") == rules(newer, "10.9") == set()
    assert rules(newer, "10.3") == {"opset"}


SHARED = """({kind}[1,32,128] x) => ({kind}[1,32,128] y) {{
    d{to} = DequantizeLinear<axis = 1>(w, s)  e{to} = DequantizeLinear<axis = 1>(v, s)  {casts}
    a = LayerNormalization(x, g)  b = MatMul(a, d)  c = {second}  m = Add(b, c)
    h = LayerNormalization(m, g)  i = MatMul(h, d)  j = MatMul(h, e)  y = Add(i, j) }}"""
CASTS = {"to": "0", "casts": "d = Cast<to = 10>(d0)  e = Cast<to = 10>(e0)"}


@pytest.mark.parametrize(
    ("changes", "crashes"),
    [
        ({}, True),
        (CASTS, True),  # scales stay fp32, and a Cast of the weights changes nothing
        ({"second": "Tanh(a)"}, False),
        ({"kind": "bfloat16"}, False),
    ],
)
def test_weights_alone_in_int8_that_blocks_share_crash_rtx(
    changes: dict[str, str], crashes: bool, tmp_path: Path
) -> None:
    """Without the check TensorRT for RTX 1.7.1 ends the process with a segmentation fault."""
    how = {"second": "MatMul(a, e)", "kind": "float16", "to": "", "casts": "", **changes}
    floats: Any = ml_dtypes.bfloat16 if how["kind"] == "bfloat16" else np.float16
    weights = {name: RNG.integers(-127, 127, (128, 128)).astype(np.int8) for name in "wv"}
    scales = np.full(128, 1e-2, np.float32 if how["to"] else floats)
    path = write(tmp_path / "s.onnx", SHARED.format(**how), 20, **weights, s=scales, g=np.ones(128, floats))

    assert rules(path, "1.7", "tensorrt-rtx") == ({"shared-weights"} if crashes else set())
    assert rules(path, "11.4") == set()  # of TensorRT itself nobody knows
    if crashes:
        assert "its compiler crashes" in refused(path)
    else:
        assert compiled(path, "bf16" if how["kind"] == "bfloat16" else "fp16").int8_products == 0


def test_overflow_of_fp16_is_a_finding(tmp_path: Path) -> None:
    body = "(float16[1,64] x) => (float16[1,64] y) { y = Add(x, c) }"
    infinite = write(tmp_path / "i.onnx", body, c=np.array([np.inf], np.float16))
    deep = write(tmp_path / "s.onnx", "(float16[1,70000] x) => (float16[1,70000] y) { y = Softmax<axis = -1>(x) }")

    assert rules(infinite) == rules(deep) == {"overflow"}
    assert "--target tensorrt-rtx " in lint(deep, "tensorrt-rtx")[0].findings[0].fix


def test_findings_of_one_kind_are_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "(float[4] x) => (float[4] y) { a = FastGelu(x)  b = FastGelu(a)  y = FastGelu(b) }"
    (result,) = lint(write(tmp_path / "g.onnx", body), "tensorrt-rtx")
    show_lint(result)
    shown = capsys.readouterr().out

    assert len(result.findings) == 3
    assert shown.count("FastGelu is not an ONNX operator") == 1
    assert all(finding.node in shown for finding in result.findings)
    assert not any(finding.fix.startswith("perceiver-export") for finding in result.findings)


@pytest.mark.parametrize(
    ("path", "options", "error", "datum"),
    [
        ("damaged.onnx", {}, BundleError, "damaged.onnx"),
        ("empty.onnx", {}, BundleError, "empty.onnx"),
        ("missing", {}, BundleError, "missing"),
        ("bundle", {"version": "7.1"}, DeviceError, "7.1"),
        ("bundle", {"target": "tensorrt-rtx", "version": "2.0"}, DeviceError, "2.0"),
        ("bundle", {"target": "openvino"}, UsageError, "openvino"),
        ("bundle", {"precision": "bf16"}, UsageError, "no bf16 graph"),
        ("bundle", {"precision": "int8"}, UsageError, "int8"),
    ],
)
def test_bad_questions_are_refused(
    path: str, options: dict[str, Any], error: type, datum: str, tmp_path: Path, fashion_bundle: Path
) -> None:
    (tmp_path / "damaged.onnx").write_bytes(b"not a graph")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(error) as caught:
        lint(fashion_bundle if path == "bundle" else tmp_path / path, **options)
    assert datum in str(caught.value)


@pytest.mark.parametrize(("operator", "inputs"), [("QuantizeLinear", ["x"]), ("MatMul", ["x"]), ("Softmax", [])])
def test_a_node_without_its_inputs_is_refused(operator: str, inputs: list[str], tmp_path: Path) -> None:
    body = onnx.helper.make_graph([onnx.helper.make_node(operator, inputs, ["y"])], "g", [], [])
    path = tmp_path / "g.onnx"
    onnx.save(onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)

    with pytest.raises(BundleError, match=f"{operator} has {len(inputs)} inputs"):
        lint(path)


def test_graphs_are_judged_without_their_weights(tmp_path: Path, lowered_bundle: Path) -> None:
    for name in ("model.onnx", "model.tensorrt-fp16.onnx"):
        (tmp_path / name).write_bytes((lowered_bundle / name).read_bytes())
    ir.save(ir.load(int8_linear(tmp_path / "l.onnx", zero=3)), tmp_path / "zero.onnx", external_data="zero.weights")
    (tmp_path / "zero.weights").unlink(missing_ok=True)

    assert rules(tmp_path / "model.tensorrt-fp16.onnx") == rules(tmp_path / "zero.onnx") - {"symmetric"} == set()
    (canonical,) = lint(tmp_path / "model.onnx")
    assert canonical.attentions == 8
    assert {finding.rule for finding in canonical.findings} == {"fp32-attention"}


def test_products_of_numbers_are_no_attention(tmp_path: Path) -> None:
    body = "(float q, float k, float v) => (float y) { s = MatMul(q, k)  p = Softmax(s)  y = MatMul(p, v) }"

    assert lint(write(tmp_path / "g.onnx", body))[0].attentions == 1


# Probabilities over deviations of the inputs, and sums of features and of rows and columns: as folding writes it.
FOLDED_ATTENTION = """(float16[1,1,64,32] x, float16[1,1,1,64] s) => (float16[1,1,16,32] y) {
    t = Transpose<perm = [0,1,3,2]>(x)  a = MatMul(q, t)  b = Add(a, grid)  c = Mul(b, s)
    p = Softmax<axis = -1>(c)  w = Mul(p, s)  y = MatMul(w, x) }"""
AS_QUERIES = """(float16[1,1,64,66] x, float16[1,1,64,1] s, float16[1,1,66,16] k, float16[1,1,16,322] v)
    => (float16[1,1,64,322] y) { a = MatMul(x, k)  b = Mul(a, FACTOR)  p = Softmax<axis = -1>(b)  y = MatMul(p, v) }"""


def test_folded_attention_is_told_from_what_fuses_and_from_a_classifier(tmp_path: Path) -> None:
    queries, grid = np.ones((1, 1, 16, 32), np.float16), np.ones((1, 1, 16, 64), np.float16)
    folded = write(tmp_path / "f.onnx", FOLDED_ATTENTION, q=queries, grid=grid)
    classes = write(
        tmp_path / "c.onnx",
        "(float16[1,64] x) => (float16[1,8] y) { a = MatMul(x, w)  y = Softmax<axis = -1>(a) }",
        w=np.ones((64, 8), np.float16),
    )
    (found,), (none,) = lint(folded), lint(classes)
    (wide,) = lint(write(tmp_path / "w.onnx", AS_QUERIES.replace("FACTOR", "s")))
    (plain,) = lint(write(tmp_path / "p.onnx", AS_QUERIES.replace("FACTOR", "c"), c=scalar(0.5)))

    assert found.unfused == {"Softmax_4": FOLDED}
    assert (found.attentions, found.fusable, found.findings) == (1, 0, ())
    assert compiled(folded).fused_attentions == 0
    assert (none.attentions, none.unfused) == (0, {})
    assert (list(wide.unfused.values()), wide.findings) == ([FOLDED], ())
    assert "width 66" in next(iter(plain.unfused.values()))
    assert {finding.rule for finding in plain.findings} == {"wide-heads"}


def test_why_attention_is_not_one_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ATTENTION.format(qk=64, v=64)
    alone = one.replace("8,64,64", "8,1,64", 1).replace("=> (float16[1,8,64,64]", "=> (float16[1,8,1,64]")
    (query,) = lint(write(tmp_path / "q.onnx", alone))
    (fp32,) = lint(write(tmp_path / "f.onnx", one.replace("float16", "float")))

    assert query.unfused == {"Softmax_1": ONE_QUERY}
    assert fp32.unfused == {"Softmax_1": NOT_LOWERED}
    show_lint(query)
    said = " ".join(capsys.readouterr().out.split())
    assert f"0 of 1 become one kernel each 1 not fused: Softmax_1 ({ONE_QUERY})" in said


def test_scores_that_lowering_left_in_fp32_are_counted_and_no_finding(tmp_path: Path) -> None:
    body = """(float[1,8,64,64] q, float[1,8,64,64] k, float[1,8,64,64] v) => (float[1,8,64,64] y)
        { s = MatMul(q, k)  p = Softmax<axis = -1>(s)  y = MatMul(p, v) }"""
    model = ir.load(write(tmp_path / "a.onnx", body))
    ir.passes.common.ShapeInferencePass()(model)
    kept = lower_for_tensorrt(model, "fp16", {"s": 600})
    ir.save(model, tmp_path / "lowered.onnx")
    (found,) = lint(tmp_path / "lowered.onnx")

    assert set(kept) == {"MatMul_0", "Softmax_1"}
    assert (found.findings, found.unfused) == ((), {"Softmax_1": FP32})
    assert compiled(tmp_path / "lowered.onnx").fused_attentions == 0


def test_weights_are_counted_once_and_for_each_use(tmp_path: Path) -> None:
    body = """(float16[1,64,64] x) => (float16[1,64,64] y)
        { d = DequantizeLinear(w, s)  a = MatMul(x, d)  b = MatMul(a, d)  y = Add(b, c) }"""
    ones = np.ones((64, 64))
    path = write(tmp_path / "w.onnx", body, w=ones.astype(np.int8), s=scalar(0.01), c=ones[0].astype(np.float16))
    (found,) = lint(path)
    report = compiled(path)

    assert found.weight_bytes == 64 * 64 + 2 + 128
    assert found.bytes_each_use == 2 * (64 * 64 + 2) + 128
    assert report.weight_bytes == pytest.approx(found.weight_bytes, rel=0.1)  # the parser's own constants beside
    assert report.bytes_each_use == pytest.approx(found.bytes_each_use, rel=0.1)
