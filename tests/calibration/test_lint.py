# SPDX-License-Identifier: Apache-2.0
"""Lint of bundles and files: what it counts and shows, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import pytest

from perceiver_export.calibration.lint_attention import FOLDED, FP32, NOT_LOWERED, ONE_QUERY, PART_INT8
from perceiver_export.calibration.linting import Lint, lint
from perceiver_export.calibration.lowering.tensorrt import lower_for_tensorrt
from perceiver_export.calibration.lowering.tensorrt_bundle import lower_bundle
from perceiver_export.exporter.cli.lint import show_lint
from perceiver_export.runtimes.errors import BundleError, DeviceError, UsageError
from tests.calibration.lint_cases import ATTENTION, compiled, int8_linear, partly_int8_attention, rules, scalar
from tests.calibration.onnx_text import write


def test_findings_of_one_kind_are_a_row_and_the_fix_is_for_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "(float[4] x) => (float[4] y) { a = FastGelu(x)  b = FastGelu(a)  y = FastGelu(b) }"
    (result,) = lint(write(tmp_path / "g.onnx", body), "tensorrt-rtx")
    show_lint(result)
    told = capsys.readouterr().out

    assert len(result.findings) == 3
    assert told.count("FastGelu is no operator of ONNX") == 1
    assert all(finding.node in told for finding in result.findings)
    deep = "(float16[1,70000] x) => (float16[1,70000] y) { y = Softmax<axis = -1>(x) }"
    (result,) = lint(write(tmp_path / "s.onnx", deep), "tensorrt-rtx")
    assert "--target tensorrt-rtx " in result.findings[0].fix


def test_bad_questions_are_refused(tmp_path: Path, fashion_bundle: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"not a graph")

    with pytest.raises(BundleError):
        lint(damaged)
    with pytest.raises(BundleError):
        lint(tmp_path / "missing")
    with pytest.raises(DeviceError):
        lint(fashion_bundle, version="7.1")
    with pytest.raises(UsageError, match="nothing to lint for openvino"):
        lint(fashion_bundle, "openvino")
    with pytest.raises(UsageError, match="has no bf16 graph"):
        lint(fashion_bundle, precision="bf16")
    with pytest.raises(UsageError, match=r"8\.6 has no bf16") as raised:
        lint(fashion_bundle, version="8.6", precision="bf16")
    assert raised.value.hint == "give --precision fp16 or fp32"
    with pytest.raises(DeviceError) as unknown:
        lint(fashion_bundle, "tensorrt-rtx", "2.0")
    assert "JetPack" not in unknown.value.hint
    with pytest.raises(UsageError, match="precision is 'int8'"):
        lint(fashion_bundle, precision="int8")


@pytest.mark.parametrize(
    ("operator", "inputs", "message"),
    [
        ("QuantizeLinear", ["x"], "QuantizeLinear has 1 inputs, QuantizeLinear has 2"),
        ("MatMul", ["x"], "MatMul has 1 inputs"),
        ("Softmax", [], "Softmax has 0 inputs"),
    ],
)
def test_a_node_without_its_inputs_is_refused(operator: str, inputs: list[str], message: str, tmp_path: Path) -> None:
    body = onnx.helper.make_graph([onnx.helper.make_node(operator, inputs, ["y"])], "g", [], [])
    path = tmp_path / "g.onnx"
    onnx.save(onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)

    with pytest.raises(BundleError, match=message):
        lint(path)


def test_an_empty_file_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").touch()

    with pytest.raises(BundleError, match="names no opset"):
        lint(tmp_path / "g.onnx")


def test_products_of_numbers_are_no_attention(tmp_path: Path) -> None:
    body = "(float q, float k, float v) => (float y) { s = MatMul(q, k)  p = Softmax(s)  y = MatMul(p, v) }"

    assert lint(write(tmp_path / "g.onnx", body))[0].attentions == 1


def test_lowered_graphs_are_judged_without_their_weights(tmp_path: Path, copied_bundle: Path) -> None:
    lower_bundle(copied_bundle, "tensorrt-rtx", "fp16")
    alone = tmp_path / "alone.onnx"
    alone.write_bytes((copied_bundle / "model.tensorrt-fp16.onnx").read_bytes())

    assert rules(alone) == set()
    (before,) = lint(copied_bundle / "model.onnx")  # whose lowered form lies beside it
    command = f"perceiver-export lint {copied_bundle} --target tensorrt --precision fp16"
    assert {finding.fix for finding in before.findings} == {f"it is lowered beside: {command}"}


def test_zero_points_in_a_file_of_weights_are_not_read(tmp_path: Path) -> None:
    model = ir.load(int8_linear(tmp_path / "l.onnx", zero=3))
    ir.save(model, tmp_path / "external.onnx", external_data="l.weights", size_threshold_bytes=0)
    (tmp_path / "l.weights").unlink()

    assert rules(tmp_path / "external.onnx") == set()


def test_graphs_are_judged_without_their_weights(tmp_path: Path, plain_fashion_bundle: Path) -> None:
    alone = tmp_path / "model.onnx"
    alone.write_bytes((plain_fashion_bundle / "model.onnx").read_bytes())
    found: tuple[Lint, ...] = lint(alone)

    assert found[0].attentions == 8
    assert onnx.load(str(alone), load_external_data=False).opset_import[0].version == 20


# Probabilities over deviations of the inputs, and sums of features and of rows and columns: as folding writes it.
FOLDED_ATTENTION = """(float16[1,1,64,32] x, float16[1,1,1,64] s) => (float16[1,1,16,32] y) {
    t = Transpose<perm = [0,1,3,2]>(x)  a = MatMul(q, t)  b = Add(a, grid)  c = Mul(b, s)
    p = Softmax<axis = -1>(c)  w = Mul(p, s)  y = MatMul(w, x) }"""


def test_folded_attention_is_told_from_what_fuses_and_from_a_classifier(tmp_path: Path) -> None:
    queries, grid = np.ones((1, 1, 16, 32), np.float16), np.ones((1, 1, 16, 64), np.float16)
    folded = write(tmp_path / "f.onnx", FOLDED_ATTENTION, q=queries, grid=grid)
    classes = write(
        tmp_path / "c.onnx",
        "(float16[1,64] x) => (float16[1,8] y) { a = MatMul(x, w)  y = Softmax<axis = -1>(a) }",
        w=np.ones((64, 8), np.float16),
    )
    (found,), (none,) = lint(folded), lint(classes)

    assert found.unfused == {"Softmax_4": FOLDED}
    assert (found.attentions, found.fusable, found.findings) == (1, 0, ())
    assert compiled(folded).fused_attentions == 0
    assert (none.attentions, none.unfused) == (0, {})


def test_inputs_as_folded_queries_are_no_wide_heads(tmp_path: Path) -> None:
    body = """(float16[1,1,64,66] x, float16[1,1,64,1] s, float16[1,1,66,16] k, float16[1,1,16,322] v)
      => (float16[1,1,64,322] y) { a = MatMul(x, k)  b = Mul(a, FACTOR)
        p = Softmax<axis = -1>(b)  y = MatMul(p, v) }"""
    (folded,) = lint(write(tmp_path / "f.onnx", body.replace("FACTOR", "s")))
    (plain,) = lint(write(tmp_path / "p.onnx", body.replace("FACTOR", "c"), c=scalar(0.5)))

    assert (list(folded.unfused.values()), folded.findings) == ([FOLDED], ())
    assert "66 wide" in next(iter(plain.unfused.values()))
    assert {finding.rule for finding in plain.findings} == {"wide-heads"}


def test_why_attention_is_not_one_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ATTENTION.format(qk=64, v=64)
    alone = one.replace("8,64,64", "8,1,64", 1).replace("=> (float16[1,8,64,64]", "=> (float16[1,8,1,64]")
    graphs = {"query": alone, "fp32": one.replace("float16", "float"), "wide": ATTENTION.format(qk=512, v=512)}
    found = {name: lint(write(tmp_path / f"{name}.onnx", body))[0] for name, body in graphs.items()}
    (on_8,) = lint(tmp_path / "fp32.onnx", version="8.6")

    assert found["query"].unfused == {"Softmax_1": ONE_QUERY}
    assert found["fp32"].unfused == {"Softmax_1": NOT_LOWERED}
    assert found["wide"].unfused["Softmax_1"].startswith("its heads are 512 wide")
    assert on_8.fusable == 1  # there flags make it 16 bits wide
    show_lint(found["query"])
    assert f"0 of 1 become one kernel\n  1 not: Softmax_1 ({ONE_QUERY})" in capsys.readouterr().out


def test_scores_that_lowering_left_in_fp32_are_counted_and_no_finding(tmp_path: Path) -> None:
    body = """(float[1,8,64,64] q, float[1,8,64,64] k, float[1,8,64,64] v) => (float[1,8,64,64] y)
        { s = MatMul(q, k)  p = Softmax<axis = -1>(s)  y = MatMul(p, v) }"""
    model = ir.load(write(tmp_path / "a.onnx", body))
    ir.passes.common.ShapeInferencePass()(model)
    kept = lower_for_tensorrt(model, "tensorrt", "fp16", {"s": 600})
    ir.save(model, tmp_path / "lowered.onnx")
    (found,) = lint(tmp_path / "lowered.onnx")

    assert set(kept) == {"MatMul_0", "Softmax_1"}
    assert found.findings == ()
    assert found.unfused == {"Softmax_1": FP32}
    assert compiled(tmp_path / "lowered.onnx").fused_attentions == 0


def test_attention_that_is_partly_int8_is_counted(tmp_path: Path) -> None:
    (found,) = lint(partly_int8_attention(tmp_path / "a.onnx"))

    assert found.unfused == {"Softmax_5": PART_INT8}


def test_weights_are_counted_once_and_for_each_use(tmp_path: Path) -> None:
    body = """(float16[1,64,64] x) => (float16[1,64,64] y)
        { d = DequantizeLinear(w, s)  a = MatMul(x, d)  b = MatMul(a, d)  y = Add(b, c) }"""
    path = write(
        tmp_path / "w.onnx",
        body,
        w=np.ones((64, 64), np.int8),
        s=scalar(0.01),
        c=np.ones(64, np.float16),
    )
    (found,) = lint(path)
    report = compiled(path)

    assert found.weight_bytes == 64 * 64 + 2 + 128
    assert found.bytes_each_use == 2 * (64 * 64 + 2) + 128
    assert report.weight_bytes == pytest.approx(found.weight_bytes, rel=0.1)  # the parser's own constants beside
    assert report.bytes_each_use == pytest.approx(found.bytes_each_use, rel=0.1)
