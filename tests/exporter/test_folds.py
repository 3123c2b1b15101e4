# SPDX-License-Identifier: Apache-2.0
"""Every fold is the module that it replaces, in float64: heads, masks, residuals, 1 to 3 axes, several inputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from perceiver_export.exporter.model.attention import CrossAttention, SelfAttention
from perceiver_export.exporter.model.config import AttentionConfig, FourierPositions
from perceiver_export.exporter.model.inputs import fourier_table
from perceiver_export.exporter.module_folds.constants import (
    Constants,
    fourier_constants,
    free_constants,
    with_padding,
)
from perceiver_export.exporter.module_folds.deviation import Modality
from perceiver_export.exporter.module_folds.few_queries import FewQueriesAttention
from perceiver_export.exporter.module_folds.many_queries import InputQueriesAttention
from perceiver_export.exporter.module_folds.position_queries import PositionQueriesAttention
from perceiver_export.exporter.module_folds.self_attention import ChunkedSelfAttention
from perceiver_export.exporter.module_folds.tails import Linear, LinearTail

TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def grid(*shape: int, bands: int = 2) -> Constants:
    config = FourierPositions(bands, tuple(float(size) for size in shape))
    return fourier_constants(config, shape, fourier_table(config, shape))


def attention(num_queries: int, num_inputs: int, heads: int, residual: bool, rows: str = "mean") -> CrossAttention:
    config = AttentionConfig(heads, 8, 12, 2, residual)
    module = CrossAttention(config, num_queries, num_inputs, "gelu", "zero" if rows == "zero" else "mean")
    for parameter in module.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


MODALITIES = {
    "picture": lambda: [Modality(3, grid(5, 7))],
    "sound": lambda: [Modality(4, grid(9, bands=3))],
    "voxels": lambda: [Modality(2, grid(3, 2, 4, bands=1))],
    "learned": lambda: [Modality(3, free_constants((12,), torch.randn(12, 6)))],
    "projected": lambda: [Modality(7, free_constants((12,), torch.randn(12, 6)), torch.randn(4, 7))],
    "no constants": lambda: [Modality(9, Constants((11,), 0, ()))],
    "several": lambda: [
        Modality(4, grid(3, 2, 5)),
        Modality(2, with_padding(grid(6), torch.randn(1, 12))),
        Modality(0, with_padding(Constants((2,), 0, ()), torch.randn(1, 19))),
    ],
}


@pytest.mark.parametrize("kind", MODALITIES)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [None, "mean", "zero"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_few_queries(kind: str, heads: int, residual: bool, rows: str | None, chunk: int | None) -> None:
    modalities = MODALITIES[kind]()
    reference = attention(10, modalities[0].num_channels, heads, residual, rows or "mean")
    assert difference(reference, modalities, torch.randn(1, 6, 10), rows is not None, chunk) <= TOLERANCE


def difference(
    reference: CrossAttention, modalities: list[Modality], queries: Tensor, masked: bool, chunk: int | None
) -> float:
    """The largest between the folded attention of few queries and the reference, on random inputs."""
    values = [
        _ones(one, 3 * torch.randn(2, one.constants.num_rows, one.num_values) + 1) if one.num_features else None
        for one in modalities
    ]
    features = [None if own is None else one.to_features(own) for own, one in zip(values, modalities, strict=True)]
    inputs = torch.cat([_beside(own, one.constants) for own, one in zip(features, modalities, strict=True)], dim=1)
    mask = None
    if masked:
        mask = (torch.rand(2, inputs.shape[1]) > 0.3).int()
        mask[1] = 0
    expected = reference(queries, inputs, mask)
    first = [None if own is None else own.transpose(1, 2) for own in values]  # channels first
    found = FewQueriesAttention(reference, modalities, chunk)(queries, first, mask)
    return float((found - expected).abs().max())


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_few_queries_of_any_size(data: st.DataObject) -> None:
    """Sizes, heads, masks, splits into features and positions, 1 to 3 axes, with and without a LayerNorm's own."""
    sizes = st.integers(1, 4)
    constants = grid(*data.draw(st.lists(sizes, min_size=1, max_size=3), "grid"), bands=data.draw(sizes, "bands"))
    if data.draw(st.booleans(), "learned"):
        constants = free_constants(constants.shape, constants.table() + torch.randn(constants.num_rows, 1))
    if padding := data.draw(st.integers(0, 3), "padding"):
        constants = with_padding(constants, torch.randn(1, padding))
    num_features = data.draw(st.integers(0, 5), "features")
    basis = torch.randn(data.draw(sizes, "values"), num_features) if num_features and data.draw(st.booleans()) else None
    modality = Modality(num_features, constants, basis)
    heads, residual = data.draw(st.sampled_from([1, 2, 4]), "heads"), data.draw(st.booleans(), "residual")
    rows, masked = data.draw(st.sampled_from(["mean", "zero"])), data.draw(st.booleans(), "masked")
    reference = attention(10, modality.num_channels, heads, residual, rows)
    if data.draw(st.booleans(), "plain LayerNorm"):
        reference.input_norm.weight.fill_(1)
        reference.input_norm.bias.zero_()
    queries = torch.randn(data.draw(st.sampled_from([1, 2])), data.draw(sizes, "queries"), 10)

    assert difference(reference, [modality], queries, masked, data.draw(sizes, "chunk")) <= TOLERANCE


@pytest.mark.parametrize("kind", ["picture", "sound", "voxels", "learned", "projected", "no constants"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
def test_input_queries(kind: str, heads: int, residual: bool, chunk: int | None) -> None:
    (modality,) = MODALITIES[kind]()
    if residual:  # adds the features themselves
        modality = dataclasses.replace(modality, basis=None)
    reference = attention(modality.num_channels, 10, heads, residual)
    layers = [nn.Linear(modality.num_channels, 6), nn.Linear(6, 2)]
    values = _ones(modality, 2 * torch.randn(2, modality.constants.num_rows, modality.num_values) + 1)
    features = modality.to_features(values)
    latents = torch.randn(2, 9, 10)

    expected = layers[1](layers[0](reference(_beside(features, modality.constants), latents))) * 0.2
    tail = LinearTail(reference, _linear(layers), 0.2)
    found = InputQueriesAttention(reference, tail, modality, chunk)(latents, values.transpose(1, 2))

    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 5)])
@pytest.mark.parametrize("heads", [1, 2])
def test_position_queries(shape: tuple[int, ...], heads: int) -> None:
    constants = with_padding(grid(*shape), torch.randn(1, 5))
    reference = attention(constants.num_channels, 10, heads, residual=False)
    layers = [nn.Linear(constants.num_channels, 6)]
    latents = torch.randn(2, 9, 10)

    expected = layers[0](reference(constants.table().unsqueeze(0), latents))
    folded = PositionQueriesAttention(reference, LinearTail(reference, _linear(layers)), constants)
    indices = torch.randint(0, constants.num_rows, (2, 4))

    assert (folded(latents, None) - expected).abs().max() <= TOLERANCE
    wanted = torch.stack([expected[sample, indices[sample]] for sample in range(2)])
    assert (folded(latents, indices) - wanted).abs().max() <= TOLERANCE


@given(st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_many_queries_of_any_size(data: st.DataObject) -> None:
    """Inputs and grid points as queries: sizes, heads, chunks, 1 to 3 axes, padding, a tail of one to three layers."""
    sizes = st.integers(1, 4)
    constants = grid(*data.draw(st.lists(sizes, min_size=1, max_size=3), "grid"), bands=data.draw(sizes, "bands"))
    if padding := data.draw(st.integers(0, 3), "padding"):
        constants = with_padding(constants, torch.randn(1, padding))
    num_features = data.draw(st.integers(0, 5), "features")
    heads, chunk = data.draw(st.sampled_from([1, 2, 4]), "heads"), data.draw(sizes, "chunk")
    residual = bool(num_features) and data.draw(st.booleans(), "residual")
    linear = num_features and not residual and data.draw(st.booleans(), "linear")
    basis = torch.randn(data.draw(sizes, "values"), num_features) if linear else None
    modality = Modality(num_features, constants, basis)
    width = modality.num_channels
    reference = attention(width, 10, heads, residual)
    widths = [width, *data.draw(st.lists(sizes, min_size=1, max_size=3), "layers")]
    layers = [nn.Linear(before, after) for before, after in itertools.pairwise(widths)]
    tail = LinearTail(reference, _linear(layers), 0.5)
    values = _ones(modality, 2 * torch.randn(2, constants.num_rows, modality.num_values) + 1)
    features = modality.to_features(values)
    latents = torch.randn(2, data.draw(sizes, "latents"), 10)

    expected = 0.5 * nn.Sequential(*layers)(reference(_beside(features, constants), latents))
    if num_features:
        found = InputQueriesAttention(reference, tail, modality, chunk)(latents, values.transpose(1, 2))
    else:
        found = PositionQueriesAttention(reference, tail, constants, chunk)(latents, None)
    assert (found - expected).abs().max() <= TOLERANCE


@given(st.integers(1, 9), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_self_attention_in_pieces(latents: int, heads: int, at_a_time: int, rows: int) -> None:
    config = AttentionConfig(heads, 8, 12, 2)
    reference = SelfAttention(config, 10, "gelu").eval()
    x = torch.randn(2, latents, 10)
    assert (ChunkedSelfAttention(reference, at_a_time, rows)(x) - reference(x)).abs().max() <= TOLERANCE


def _ones(modality: Modality, values: Tensor) -> Tensor:
    """The last value of a basis is 1, for its bias."""
    if modality.basis is not None:
        values[..., -1] = 1
    return values


def _beside(features: Tensor | None, constants: Constants) -> Tensor:
    table = constants.table().expand(2, -1, -1)
    return table if features is None else torch.cat([features, table], dim=-1)


def _linear(layers: list[nn.Linear]) -> list[Linear]:
    return [Linear(layer.weight, layer.bias) for layer in layers]
