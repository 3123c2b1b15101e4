# SPDX-License-Identifier: Apache-2.0
"""Every small system is the same with all folds, in small chunks, in float64: whole, and cut in encoder and decoder."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from perceiver_export.exporter import ExportOptions, LoadedModel, export
from perceiver_export.exporter.fold.engine import fold
from perceiver_export.exporter.fold.nodes import Sizes
from perceiver_export.exporter.fold.nodes import sizes as shape_of
from perceiver_export.exporter.fold.plan import in_pieces, plan
from perceiver_export.exporter.fold.sites import LEAST_GAIN
from perceiver_export.exporter.graphs import Batch, GraphPart, Split, split_model, whole_model
from perceiver_export.exporter.model.architectures import EncoderSizes, first_perceiver
from perceiver_export.exporter.model.config import (
    ArrayInput,
    AttentionConfig,
    EncoderConfig,
    FourierPositions,
    Input,
    InputQueries,
    LearnedQueries,
    MaskedInput,
    OutputConfig,
    PerceiverConfig,
    QueryDecoder,
)
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.exporter.pipeline import parse_budget
from perceiver_export.exporter.trace import folded_graph, sample_inputs
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.errors import UsageError
from tests.cli import small_models
from tests.conftest import SmallBundle
from tests.exporter.double import doubled, in_double
from tests.preset_graphs import traced

from .conftest import TracedOnce

SYSTEMS = (
    "language", "sentiment", "glue", "pictures", "flow", "video", "sound", "mel", "first_sound", "points", "sets",
)  # fmt: skip
ONE = AttentionConfig(1, 16, 16)
IMAGE = ArrayInput((6, 5), 3, positions=FourierPositions(2, (6.0, 5.0)))
OWN = {
    "a set": (ArrayInput((40,), 16), 0),
    "projected": (msgspec.structs.replace(IMAGE, patch=(1, 1), num_projected_channels=9), 0),
    "narrower queries": (IMAGE, 4),
    "four axes": (ArrayInput((3, 2, 3, 2), 3, positions=FourierPositions(1, (3.0, 2.0, 3.0, 2.0))), 0),
}
TOLERANCE = 1e-10
ALWAYS = -(1 << 60)  # FLOPs that a fold must save: every site is rewritten
BUDGET = 512 << 20


def shallow(system: str) -> LoadedModel:
    """A system with one layer in each of two blocks, and random parameters."""
    made = getattr(small_models, system)()
    encoder = msgspec.structs.replace(made.config.encoder, num_self_attentions_per_block=1)
    config = msgspec.structs.replace(made.config, encoder=encoder)
    found = small_models.loaded(config, made.task, made.preprocessing, made.labels, made.split)
    random(found.model)
    return found


def random(model: PerceiverIO) -> PerceiverIO:
    """All parameters, biases and norms included, away from where they start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def assert_folds_change_nothing(part: GraphPart, config: PerceiverConfig, plain: ir.Model | None = None) -> None:
    """Those that pay, then all that there are, in the smallest pieces."""
    feeds = {name: doubled(array) for name, array in sample_inputs(part, config, part.typical, seed=0).items()}
    plain = plain or traced(part, config)
    in_double(plain)
    expected = ReferenceEvaluator(ir.to_proto(plain)).run(None, feeds)
    for least_gain, limit in ((LEAST_GAIN, BUDGET), (ALWAYS, 0)):
        model = plain.clone()
        fold(model, Sizes(), part.samples, least_gain)
        in_pieces(model, limit, Sizes())
        found = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=TOLERANCE * max(1, np.abs(one).max()))


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("batch", [1, 2])
def test_all_folds_give_the_same(system: str, batch: int, traced_once: TracedOnce) -> None:
    loaded = shallow(system)
    part = whole_model(loaded.model, Batch.parse(batch))
    plain = traced_once(f"{system} {batch}", lambda: traced(part, loaded.config))
    assert_folds_change_nothing(part, loaded.config, plain)


@pytest.mark.parametrize("system", ["flow", "pictures"])
def test_folds_of_a_dynamic_batch_give_the_same(system: str) -> None:
    loaded = shallow(system)
    part = whole_model(loaded.model, Batch.parse("1:2:3"))
    graph = folded_graph(part, loaded.config, True, BUDGET)
    assert any(one.chosen == "folded" for one in graph.folds)
    found = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString())

    for batch in (1, 3):
        feeds = sample_inputs(part, loaded.config, {"batch": batch}, seed=0)
        for one, other in zip(loaded.run(feeds).values(), found.run(None, feeds), strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-4 * max(1, np.abs(one).max()))


@pytest.mark.parametrize("kind", OWN)
def test_queries_that_are_inputs_of_any_kind(kind: str) -> None:
    one, wider = OWN[kind]
    width = one.num_input_channels
    decoder = QueryDecoder(
        {
            "each": OutputConfig(InputQueries(one.num_inputs, width), (one.num_inputs, 2), 2),
            "all": OutputConfig(LearnedQueries(1, width + wider), (3,), 3),
        },
        width + wider,
        ONE,
    )
    config = PerceiverConfig({"x": one}, width, EncoderConfig(7, 12, 1, 1, ONE, ONE), decoder)
    assert_folds_change_nothing(whole_model(random(PerceiverIO(config)), Batch.parse(2)), config)


def test_a_masked_input_beside_a_wider_one() -> None:
    inputs: dict[str, Input] = {"x": IMAGE, "label": MaskedInput(2, 5)}
    decoder = QueryDecoder({"y": OutputConfig(LearnedQueries(1, 8), (3,), 3)}, 8, ONE)
    width = IMAGE.num_input_channels + 2
    config = PerceiverConfig(inputs, width, EncoderConfig(7, 12, 1, 1, ONE, ONE), decoder)
    assert_folds_change_nothing(whole_model(random(PerceiverIO(config)), Batch.parse(2)), config)


# onnx's evaluator gathers from 64 elements at most, which flow's pixels of two samples are not
@pytest.mark.parametrize(("system", "batch"), [("flow", 1), *itertools.product(["video", "language", "sets"], [1, 2])])
def test_chosen_queries_give_the_same(system: str, batch: int) -> None:
    loaded = shallow(system)
    for part in split_model(loaded.model, Batch.parse(batch), Split(queries=8)):
        assert_folds_change_nothing(part, loaded.config)


def test_points_of_a_grid_are_looked_up_in_a_table_an_axis(small_bundle: SmallBundle) -> None:
    """The queries of a video are never made: the decoder reads sums of one row an axis."""
    folds = open_bundle(small_bundle("video", split=True)).manifest.parts["decoder_video"].folds
    assert any("a projection is never computed" in one.why for one in folds if one.chosen == "folded")


def test_a_budget_is_kept_or_the_least_is_named(small_bundle: SmallBundle) -> None:
    folded = ir.load(small_bundle("flow") / "model.onnx")
    with pytest.raises(UsageError, match=r"needs at least \d+ MiB of activations") as caught:
        plan(folded, 1 << 10, Sizes())
    least = parse_budget(str(caught.value.hint).split()[2])

    budgets = (least, 8 << 20, 64 << 20)
    peaks = [plan(folded, budget, Sizes())[1].peak for budget in budgets]
    assert peaks == sorted(peaks)
    assert all(peak <= budget for peak, budget in zip(peaks, budgets, strict=True))


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("2 gib", 2 << 30), (7, 7)]
)
def test_budgets_as_text(text: str | int, size: int) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3MiB", "12TB", "1e3"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--memory-budget"):
        parse_budget(text)


def test_each_part_has_its_own_plan(tmp_path: Path) -> None:
    """Planned for the largest batch, and for as many queries as the decoder takes."""
    loaded = shallow("language")
    parts = {
        batch: export(loaded, tmp_path / batch.replace(":", "-"), ExportOptions(split=True, batch=batch)).manifest.parts
        for batch in ("1:2:16", "16")
    }
    for name in ("encoder", "decoder"):
        ranged, fixed = (parts[batch][name].plan for batch in parts)
        assert ranged is not None
        assert fixed is not None
        assert ranged.peak == fixed.peak
        assert all(stage.stage.startswith(name) for stage in ranged.stages)
    assert not any(one.site.startswith("decoder") for one in parts["16"]["encoder"].folds)


@pytest.mark.parametrize(("system", "depths"), [("pictures", [66, 66]), ("flow", [56, 56])])
def test_scores_multiply_an_even_number_of_columns(system: str, depths: list[int], traced_once: TracedOnce) -> None:
    """AMX multiplies pairs of bf16 numbers. The norm's column joins 64 and 54 others."""
    loaded = shallow(system)
    graph = traced_once(f"{system} 1", lambda: traced(whole_model(loaded.model, Batch.parse(1)), loaded.config))
    fold(graph, least_gain=ALWAYS)

    products = [node for node in graph.graph if node.op_type == "MatMul" and ".attention/" in str(node.name)]
    factors = [node.inputs[0] for node in products if len(shape_of(node.outputs[0])) == 2]
    scores = [shape_of(factor)[-1] for factor in factors if factor is not None]
    assert [depth for depth in scores if depth in (*depths, *(depth - 1 for depth in depths))] == depths


@pytest.mark.parametrize("shape", [(24, 20), (4, 12, 10)])
def test_no_engine_adds_the_axes_up_beforehand(shape: tuple[int, ...], tmp_path: Path) -> None:
    """OpenVINO would hold the sum of the axes' tables, as large as all scores, as one constant."""
    inputs: dict[str, Input] = {"x": ArrayInput(shape, 3, positions=FourierPositions(64, tuple(map(float, shape))))}
    sizes = EncoderSizes(16, 16, num_self_attentions_per_block=1, num_blocks=1, num_self_attention_heads=2)
    config = first_perceiver(inputs, sizes, 3, "deepmind", num_cross_attentions=1)
    model = PerceiverIO(config).eval()
    graph = traced(whole_model(model, Batch.parse(1)), config)
    fold(graph, least_gain=ALWAYS)
    ir.save(graph, tmp_path / "model.onnx")

    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    ops = compiled.get_runtime_model().get_ordered_ops()
    assert any(list(one.get_output_shape(0))[-len(shape) :] == list(shape) for one in ops)  # the scores
    constants = [one.get_output_shape(0) for one in ops if one.get_rt_info()["layerType"].astype(str) == "Const"]
    assert constants
    assert max(map(math.prod, constants)) < 16 * math.prod(shape)
