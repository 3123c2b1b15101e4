# SPDX-License-Identifier: Apache-2.0
"""What counts as a linear, in graphs as torch.onnx and as folds leave them; smoothing, which changes no float number,
leaves no product behind, and makes integers better.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perceiver_export.calibration.graphs import load_graph, split_gemms, sqnr
from perceiver_export.calibration.quantization.linears import PROBABILITIES, SCORES, find_linears
from perceiver_export.calibration.quantization.options import QuantizeOptions
from perceiver_export.calibration.quantization.smoothing import find_sites, smooth
from tests.calibration.graphs import BLOCK, FOLDED, GEMM, build, inputs, observed, quantized, run, save


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
    linears, exclusions = find_linears(load_graph(plain_fashion_bundle / "model.onnx").graph)
    runs = [linear for linear in linears if linear.group == "encoder.self_attentions.0.2.mlp.hidden"]

    assert len(runs) == 2  # two blocks, one weight
    assert runs[0].weight is runs[1].weight
    assert not exclusions


def test_a_table_of_positions_behind_an_index_stays_float() -> None:
    """The video decoder takes rows of its tables of scores by the queries' indices."""
    text = """
    grid (float[2, 8] x, float[8, 6] table) => (float[5, 2] y) <int64[5] points = {0, 3, 5, 1, 1}> {
      scores = MatMul (x, table)  rows = Transpose <perm = [1, 0]> (scores)
      own = Gather <axis = 0> (rows, points)  y = Softmax <axis = -1> (own)
    }
    """
    linears, exclusions = find_linears(build(text).graph)

    assert linears == []
    assert [one.reason for one in exclusions] == [SCORES]


def test_sites_are_shared_layer_norms_and_value_projections() -> None:
    model = build(BLOCK)
    sites = find_sites(find_linears(model.graph)[0])
    groups = [sorted({linear.group for linear in site.readers}) for site in sites]

    # Three LayerNorms share g and b but not readers: each site divides a copy of its own.
    assert groups == [["wk", "wv"], ["wo"], ["w1"]]
    assert [len(site.norms) for site in sites] == [1, 0, 2]
    assert [[value.group for value in site.values] for site in sites] == [[], ["wv"], []]


def test_what_something_else_reads_is_left_alone() -> None:
    text = BLOCK.replace("r = Add (o, x)", "r = Add (o, n)")  # the residual takes the normed input
    sites = find_sites(find_linears(build(text).graph)[0])

    assert [sorted({linear.group for linear in site.readers}) for site in sites] == [["wo"], ["w1"]]
    assert find_sites(find_linears(build(FOLDED).graph)[0]) == []


def test_values_whose_channels_are_shuffled_are_left_alone() -> None:
    text = BLOCK.replace("a1 = Transpose <perm = [0, 2, 1, 3]> (a)", "a1 = Transpose <perm = [0, 2, 3, 1]> (a)")
    sites = find_sites(find_linears(build(text).graph)[0])

    assert ["wo"] not in [sorted({linear.group for linear in site.readers}) for site in sites]


def test_float_outputs_stay_and_no_product_is_added(tmp_path: Path) -> None:
    model = build(BLOCK)
    path = save(model, tmp_path)
    feeds = inputs(model, 4)
    statistics = observed(path, feeds)
    before = run(model, tmp_path, feeds[0])["y"]
    operators = [node.op_type for node in model.graph]
    alphas = smooth(model.graph, find_linears(model.graph)[0], statistics, 8)

    assert set(alphas) == {"wk", "wv", "wo", "w1"}
    assert [node.op_type for node in model.graph] == operators
    np.testing.assert_allclose(run(model, tmp_path, feeds[0])["y"], before, rtol=1e-4, atol=1e-4)
    again = observed(save(model, tmp_path / "smoothed"), feeds)
    for name, activation in statistics.activations.items():  # the statistics moved along with the graph
        np.testing.assert_allclose(activation.largest, again.activations[name].largest, rtol=1e-3, atol=1e-4)


def test_smoothed_integers_are_closer_to_float(tmp_path: Path) -> None:
    found: dict[bool, float] = {}
    for smoothing in (False, True):
        part, path = quantized(
            BLOCK, tmp_path / str(smoothing), QuantizeOptions("int8", smooth=smoothing, weight_bits=8)
        )
        model = build(BLOCK)
        feeds = inputs(model, 3, seed=9)
        exact = [run(model, path.parent, one)["y"] for one in feeds]
        outputs = [run(part.models["model.onnx"], tmp_path / str(smoothing) / "int8", one)["y"] for one in feeds]
        found[smoothing] = sqnr(np.stack(exact), np.stack(outputs))

    assert found[True] > found[False] + 3


@pytest.mark.parametrize(
    ("site", "change"),
    [
        ("wk", ("=> (float[1, 6, 16] y)", "=> (float[1, 6, 16] y, float[1, 6, 16] n)")),
        ("wo", ("=> (float[1, 6, 16] y)", "=> (float[1, 6, 16] y, float[1, 6, 16] v1)")),
        ("wo", ("=> (float[1, 6, 16] y)", "=> (float[1, 6, 16] y, float[1, 2, 6, 8] a)")),
        ("wo", ("  y = Add (r1, m2)", "  again = Mul (a, a)\n  y = Add (r1, m2)")),
    ],
)
def test_what_leaves_the_graph_is_never_divided(site: str, change: tuple[str, str]) -> None:
    """An output of the graph, or an attention's output that something reads beside the linear."""
    text = BLOCK.replace(*change)
    assert text != BLOCK
    sites = find_sites(find_linears(build(text).graph)[0])

    assert site not in {linear.group for one in sites for linear in one.readers}
