# SPDX-License-Identifier: Apache-2.0
"""Each input of a model as features, which a call changes, and constants, which it does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_export.exporter.model.config import (
    ArrayInput,
    Input,
    MaskedInput,
    PositionQueries,
    TokenInput,
)
from perceiver_export.exporter.model.inputs import (
    ArrayAdapter,
    FourierPositionEncoding,
    FramePairAdapter,
    ImageAdapter,
    LearnedPositionEncoding,
    MaskTokenAdapter,
    TokenAdapter,
    fourier_channels,
)
from perceiver_export.exporter.model.perceiver import PerceiverDecoder, PerceiverIO, PositionQueryTable
from perceiver_export.exporter.module_folds.constants import (
    Constants,
    Term,
    fourier_constants,
    free_constants,
    no_constants,
    with_padding,
)
from perceiver_export.exporter.module_folds.deviation import Modality


class Features(nn.Module):
    """What an input adapter computes, without the constants beside it, channels first: (B, C_f, M).

    ``values``: what its linear layer is given, with a row of ones for the layer's bias (B, R, M).
    """

    def __init__(self, adapter: nn.Module, values: bool = False) -> None:
        super().__init__()
        self.adapter, self.values = adapter, values

    def forward(self, array: Tensor) -> Tensor:
        if self.values:
            assert isinstance(self.adapter, ImageAdapter | FramePairAdapter | ArrayAdapter)
            values = self.adapter.values_of(array).transpose(1, 2)
            return torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
        assert isinstance(self.adapter, ImageAdapter | FramePairAdapter | TokenAdapter | ArrayAdapter)
        return self.adapter.features_of(array).transpose(1, 2)


def modality_of(model: PerceiverIO, name: str) -> Modality:
    """How many features an input has, and its constants: positions on their grid, padding, or a mask token."""
    config, adapter = model.config.inputs[name], model.inputs[name]
    if isinstance(config, MaskedInput):
        assert isinstance(adapter, MaskTokenAdapter)
        constants = with_padding(no_constants((config.num_inputs,)), adapter.token.detach())
    else:
        constants = _constants_of(adapter, config)
    num_features = config.num_input_channels - constants.num_channels
    if name in model.input_paddings:
        constants = with_padding(constants, model.input_paddings[name].detach())
    return Modality(num_features, constants, _basis(adapter))


def query_modality(model: PerceiverIO, reference: PerceiverDecoder, output: str) -> Modality:
    """The only input as an output's queries: its features themselves, as wide as the queries of all outputs."""
    (name,) = model.config.inputs
    modality = modality_of(model, name)
    constants = modality.constants
    if output in reference.paddings:
        constants = with_padding(constants, reference.paddings[output].detach())
    residual = reference.cross_attention.query_residual  # adds the features themselves
    return Modality(modality.num_features, constants, None if residual else modality.basis)


def position_constants(reference: PerceiverDecoder, name: str, queries: PositionQueries) -> Constants:
    """The queries of a grid, padding included, axis by axis."""
    table = reference.queries[name]
    assert isinstance(table, PositionQueryTable)
    terms = tuple(
        Term(tuple(fourier_channels(queries.positions, len(queries.shape), axis)), axis, table.axis_table(axis))
        for axis in range(len(queries.shape))
    )
    constants = Constants(queries.shape, queries.num_channels, terms)
    return with_padding(constants, reference.paddings[name].detach()) if name in reference.paddings else constants


def _basis(adapter: nn.Module) -> Tensor | None:
    """The matrix of an adapter's linear layer over its bias (R, C_f), where it makes many features of few values."""
    if isinstance(adapter, FramePairAdapter):
        weight, bias = adapter.features.weight.permute(0, 2, 3, 1).flatten(1), adapter.features.bias
    elif isinstance(adapter, ImageAdapter) and isinstance(adapter.features, nn.Conv2d):
        weight, bias = adapter.features.weight.flatten(1), adapter.features.bias
    elif isinstance(adapter, ArrayAdapter) and isinstance(adapter.projection, nn.Linear):
        weight, bias = adapter.projection.weight, adapter.projection.bias
    else:
        return None
    assert bias is not None
    basis = torch.cat([weight.detach().T, bias.detach()[None]])
    return basis if basis.shape[0] < basis.shape[1] else None


def _constants_of(adapter: nn.Module, config: Input) -> Constants:
    encoding = getattr(adapter, "positions", None)
    if isinstance(encoding, FourierPositionEncoding):
        return fourier_constants(encoding.config, encoding.shape, encoding.table)
    if isinstance(encoding, LearnedPositionEncoding):
        return free_constants(encoding.shape, encoding().detach())
    # Tokens carry their positions within, points are theirs.
    assert isinstance(config, ArrayInput | TokenInput)
    return no_constants(config.grid if isinstance(config, ArrayInput) else (config.length,))
