# SPDX-License-Identifier: Apache-2.0
"""What counts as a linear, in graphs as torch.onnx and as folds leave them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perceiver_export.calibration.graphs import split_gemms
from perceiver_export.calibration.quantization.linears import PROBABILITIES, SCORES, find_linears
from tests.calibration.graphs import BLOCK, FOLDED, GEMM, build, inputs, run


def test_linears_have_their_weight_bias_and_cost() -> None:
    linears, exclusions = find_linears(build(BLOCK).graph)

    assert [linear.group for linear in linears] == ["wk", "wv", "wo", "w1", "w2", "w1", "w2"]
    assert [str(linear.bias.name) for linear in linears if linear.bias] == ["bk", "bv", "bo", "b1", "b2", "b1", "b2"]
    assert [linear.macs for linear in linears] == [6 * 16 * 16] * 3 + [6 * 16 * 32] * 4
    assert exclusions == []


def test_products_of_probabilities_and_scores_with_tables_stay_float() -> None:
    linears, exclusions = find_linears(build(FOLDED).graph)

    assert [linear.group for linear in linears] == ["w", "w", "key", "wo"]
    assert [(one.name, one.reason) for one in exclusions] == [
        ("block.8/MatMul", SCORES),
        ("block.10/MatMul", PROBABILITIES),
    ]


def test_a_gemm_becomes_a_linear_with_the_same_result(tmp_path: Path) -> None:
    model = build(GEMM)
    (feeds,) = inputs(model, 1)
    before = run(model, tmp_path, feeds)["y"]
    split_gemms(model.graph)

    assert [linear.bias is not None for linear in find_linears(model.graph)[0]] == [False, True]
    np.testing.assert_allclose(run(model, tmp_path, feeds)["y"], before, rtol=1e-5, atol=1e-5)


def test_the_exported_model_has_the_linears_that_its_layers_have(plain_fashion_bundle: Path) -> None:
    from perceiver_export.calibration.graphs import load_graph

    linears, exclusions = find_linears(load_graph(plain_fashion_bundle / "model.onnx").graph)
    runs = [linear for linear in linears if linear.group == "encoder.self_attentions.0.2.mlp.hidden"]

    assert len(runs) == 2  # two blocks, one weight
    assert runs[0].weight is runs[1].weight
    assert not exclusions


def test_a_table_of_positions_behind_an_index_stays_float() -> None:
    """The video decoder takes rows of its tables of scores by the queries' indices."""
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    grid (float[2, 8] x, float[8, 6] table) => (float[5, 2] y) <int64[5] points = {0, 3, 5, 1, 1}> {
      scores = MatMul (x, table)  rows = Transpose <perm = [1, 0]> (scores)
      own = Gather <axis = 0> (rows, points)  y = Softmax <axis = -1> (own)
    }
    """
    linears, exclusions = find_linears(build(text).graph)

    assert linears == []
    assert [one.reason for one in exclusions] == [SCORES]
