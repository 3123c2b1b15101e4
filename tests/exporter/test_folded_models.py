# SPDX-License-Identifier: Apache-2.0
"""Every small system is the same with all folds, in small chunks, in float64: whole, and cut in encoder and decoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx_ir as ir
import openvino
import pytest
import torch
from torch import Tensor

from perceiver_export.exporter import ExportOptions, LoadedModel, export
from perceiver_export.exporter.graphs import Batch, planned_queries, split_model, whole_model
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
from perceiver_export.exporter.module_folds.folded import FoldedPerceiver
from perceiver_export.exporter.module_folds.plan import heads_and_rows
from perceiver_export.exporter.module_folds.sites import Sites, choose_sites
from perceiver_export.exporter.pipeline import parse_budget
from perceiver_export.exporter.trace import sample_inputs, trace
from perceiver_export.runtimes.errors import UsageError
from tests.cli import small_models

SYSTEMS: dict[str, Callable[[], LoadedModel]] = {
    name: getattr(small_models, name)
    for name in (
        "language", "sentiment", "glue", "pictures", "flow", "video", "sound", "mel", "first_sound", "points", "sets",
    )
}  # fmt: skip
ONE = AttentionConfig(1, 16, 16)
IMAGE = ArrayInput((6, 5), 3, positions=FourierPositions(2, (6.0, 5.0)))
OWN = {
    "a set": (ArrayInput((40,), 16), 0),
    "projected": (msgspec.structs.replace(IMAGE, patch=(1, 1), num_projected_channels=9), 0),
    "narrower queries": (IMAGE, 4),
    "four axes": (ArrayInput((3, 2, 3, 2), 3, positions=FourierPositions(1, (3.0, 2.0, 3.0, 2.0))), 0),
}
TOLERANCE = 1e-10
BUDGET = 512 << 20


def all_folds(sites: Sites, chunk: int) -> Sites:
    """Every fold that there is, paying or not, in chunks of this size."""
    foldable = {one.site for one in sites.folds}
    outputs = {
        name: dataclasses.replace(
            site,
            folded=f"decoder.{name}" in foldable,
            linear_tail=f"decoder.{name}.tail" in foldable,
            at_a_time=chunk,
        )
        for name, site in sites.outputs.items()
    }
    encoder = dataclasses.replace(sites.encoder, folded=True, at_a_time=chunk)
    return dataclasses.replace(sites, encoder=encoder, outputs=outputs, heads=1, rows=chunk)


def random(model: PerceiverIO) -> PerceiverIO:
    """All parameters, biases and norms included, away from where they start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def feeds_of(loaded: LoadedModel, batch: int) -> dict[str, Tensor]:
    part = whole_model(loaded.model, Batch.parse(batch))
    arrays = sample_inputs(part, loaded.config, part.typical, seed=0)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: one.double() if one.is_floating_point() else one for name, one in tensors.items()}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("batch", [1, 2])
def test_all_folds_give_the_same(system: str, batch: int) -> None:
    loaded = SYSTEMS[system]()
    model, feeds = random(loaded.model), feeds_of(loaded, batch)
    chosen = choose_sites(model, BUDGET, batch, None)

    with torch.no_grad():
        expected = model(feeds)
        for sites in (chosen, all_folds(chosen, 2), all_folds(chosen, 5)):
            found = FoldedPerceiver(model, sites)(feeds)
            for name, one in expected.items():
                assert (found[name] - one).abs().max() <= TOLERANCE * max(1, one.abs().max())


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
    assert_folds_change_nothing(PerceiverConfig({"x": one}, width, EncoderConfig(7, 12, 1, 1, ONE, ONE), decoder))


def test_a_masked_input_beside_a_wider_one() -> None:
    inputs: dict[str, Input] = {"x": IMAGE, "label": MaskedInput(2, 5)}
    decoder = QueryDecoder({"y": OutputConfig(LearnedQueries(1, 8), (3,), 3)}, 8, ONE)
    width = IMAGE.num_input_channels + 2
    assert_folds_change_nothing(PerceiverConfig(inputs, width, EncoderConfig(7, 12, 1, 1, ONE, ONE), decoder))


def assert_folds_change_nothing(config: PerceiverConfig) -> None:
    model = random(PerceiverIO(config))
    feeds = {
        name: torch.randn(2, *one.shape, one.num_channels, dtype=torch.float64)
        for name, one in config.inputs.items()
        if isinstance(one, ArrayInput)
    }
    chosen = choose_sites(model, BUDGET, 2, None)
    with torch.no_grad():
        expected = model(feeds)
        for sites in (chosen, all_folds(chosen, 2)):
            found = FoldedPerceiver(model, sites)(feeds)
            for name, one in expected.items():
                assert (found[name] - one).abs().max() <= TOLERANCE * max(1, one.abs().max())


def test_four_axes_stay_plain() -> None:
    axes = ArrayInput((8, 8, 8, 8), 3, positions=FourierPositions(4, (8.0, 8.0, 8.0, 8.0)))
    decoder = QueryDecoder({"y": OutputConfig(LearnedQueries(1, 8), (3,), 3)}, 8, ONE)
    model = PerceiverIO(
        PerceiverConfig({"x": axes}, axes.num_input_channels, EncoderConfig(16, 12, 1, 1, ONE, ONE), decoder)
    )
    (encoder,) = [one for one in choose_sites(model, BUDGET, 1, None).folds if one.site.startswith("encoder")]
    assert encoder.chosen == "plain"
    assert "rank 7" in encoder.why


@pytest.mark.parametrize("system", ["flow", "video", "language", "sets"])
def test_chosen_queries_give_the_same(system: str) -> None:
    loaded = SYSTEMS[system]()
    model = random(loaded.model)
    sites = all_folds(choose_sites(model, BUDGET, 1, planned_queries(model.config, 8, dynamic=False)), 3)
    folded = FoldedPerceiver(model, sites)
    plain_parts, folded_parts = (split_model(one, Batch.parse(1), queries=8) for one in (model, folded))

    for plain, part in zip(plain_parts, folded_parts, strict=True):
        arrays = sample_inputs(plain, loaded.config, plain.typical, seed=0)
        tensors = [torch.from_numpy(array) for array in arrays.values()]
        tensors = [one.double() if one.is_floating_point() else one for one in tensors]
        with torch.no_grad():
            (expected,), (found,) = plain.module(*tensors), part.module(*tensors)
        assert (found - expected).abs().max() <= TOLERANCE * max(1, expected.abs().max())


def test_a_budget_is_kept_or_the_least_is_named() -> None:
    model = SYSTEMS["flow"]().model
    whole = choose_sites(model, BUDGET, 1, None).memory
    assert whole.peak <= BUDGET

    with pytest.raises(UsageError, match=r"needs \d+ MiB of activations"):
        choose_sites(model, 1 << 10, 1, None)

    budgets = (4 << 20, 8 << 20, 64 << 20)
    sizes = [choose_sites(model, budget, 1, None).memory.peak for budget in budgets]
    assert sizes == sorted(sizes)
    assert all(size <= budget for size, budget in zip(sizes, budgets, strict=True))


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("2 gib", 2 << 30), (7, 7)]
)
def test_budgets_as_text(text: str | int, size: int) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3MiB", "12TB", "1e3"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--memory-budget"):
        parse_budget(text)


def test_a_budget_without_folds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--memory-budget"):
        export(SYSTEMS["language"](), tmp_path / "b", ExportOptions(fold=False, memory_budget="1MiB"))
    with pytest.raises(UsageError, match="--memory-budget"):
        export(SYSTEMS["language"](), tmp_path / "b", ExportOptions(memory_budget="much"))
    assert not (tmp_path / "b").exists()


def test_each_part_has_its_own_plan(tmp_path: Path) -> None:
    """Planned for the largest batch, and for as many queries as the decoder takes."""
    loaded = SYSTEMS["language"]()
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


def test_heads_and_rows() -> None:
    config = SYSTEMS["flow"]().config.encoder  # 4 heads, 6 latents
    assert heads_and_rows(config, 24) == (4, 6)
    assert heads_and_rows(config, 18) == (2, 6)
    assert heads_and_rows(config, 6) == (1, 6)
    assert heads_and_rows(config, 4) == (1, 4)


def test_every_read_of_the_inputs_counts() -> None:
    """Unfolded, reads with the same weights have keys and values in common, as in the traced graph, but not scores."""
    inputs: dict[str, Input] = {"x": ArrayInput((16, 16), 3, positions=FourierPositions(8, (16.0, 16.0)))}
    sizes = EncoderSizes(8, 16, num_self_attentions_per_block=1, num_blocks=4, num_self_attention_heads=2)
    decisions = {}
    for reads in (1, 3, 4):
        config = first_perceiver(inputs, sizes, 3, "deepmind", num_cross_attentions=reads)
        model = PerceiverIO(config).eval()
        (decisions[reads],) = choose_sites(model, BUDGET, 1, None).folds
        if reads == 3:
            graph = trace(whole_model(model, Batch.parse(1)), config).graph
            keys = [
                node
                for node in graph
                if "cross_attentions" in str(node.name) and ".attention.key/MatMul" in str(node.name)
            ]
            assert len(keys) == 2  # the second and the third read with the same weights
    projections = decisions[3].plain.flops - 3 * (decisions[4].plain.flops - decisions[3].plain.flops)
    one_set = decisions[1].plain.flops - (decisions[4].plain.flops - decisions[3].plain.flops)

    assert projections == 2 * one_set > 0
    assert decisions[4].folded.flops == 4 * decisions[1].folded.flops


@pytest.mark.parametrize("shape", [(24, 20), (4, 12, 10)])
def test_no_engine_adds_the_axes_up_beforehand(shape: tuple[int, ...], tmp_path: Path) -> None:
    """OpenVINO would hold the sum of the axes' tables, as large as all scores, as one constant."""
    inputs: dict[str, Input] = {"x": ArrayInput(shape, 3, positions=FourierPositions(4, tuple(map(float, shape))))}
    sizes = EncoderSizes(16, 16, num_self_attentions_per_block=1, num_blocks=1, num_self_attention_heads=2)
    config = first_perceiver(inputs, sizes, 3, "deepmind", num_cross_attentions=1)
    model = PerceiverIO(config).eval()
    folded = FoldedPerceiver(model, all_folds(choose_sites(model, BUDGET, 1, None), 16))
    ir.save(trace(whole_model(folded, Batch.parse(1)), config), tmp_path / "model.onnx")

    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    ops = compiled.get_runtime_model().get_ordered_ops()
    assert any(list(one.get_output_shape(0))[-len(shape) :] == list(shape) for one in ops)  # the scores
    constants = [one.get_output_shape(0) for one in ops if one.get_rt_info()["layerType"].astype(str) == "Const"]
    assert constants
    assert max(map(math.prod, constants)) < 16 * math.prod(shape)
