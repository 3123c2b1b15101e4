# SPDX-License-Identifier: Apache-2.0
"""Input adapters: from the arrays of a sensor to the M × C inputs that the encoder reads.

Position encodings are computed once, when the model is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_export.exporter.model.config import (
    ArrayInput,
    FourierPositions,
    FramePairInput,
    ImageInput,
    Input,
    LearnedPositions,
    MaskedInput,
    Positions,
    TokenInput,
)


def grid_positions(shape: tuple[int, ...], endpoint: bool, dtype: torch.dtype) -> Tensor:
    """Coordinates of every point of a grid, first axis slowest: (prod(shape), len(shape)).

    On each axis they are linspace(-1, 1), or -1 + 2 i / size without ``endpoint``.
    """
    axes = [
        torch.linspace(-1.0, 1.0, size, dtype=dtype) if endpoint else -1 + 2 * torch.arange(size, dtype=dtype) / size
        for size in shape
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def fourier_features(positions: Tensor, config: FourierPositions) -> Tensor:
    """Fourier features of positions (…, A) -> (…, A·(2K+1)).

    Perceiver IO, appendix D: sin(π f_k p) and cos(π f_k p), f_k linear from 1 to max_resolution/2. The order of the
    operations is transformers', so that float32 tables are bit-identical to its own.
    """
    bands = torch.stack(
        [
            torch.linspace(1.0, size / 2, config.num_bands, dtype=positions.dtype, device=positions.device)
            for size in config.max_resolution
        ]
    )
    phases = (math.pi * (positions[..., :, None] * bands)).flatten(-2)
    return torch.cat([positions, torch.sin(phases), torch.cos(phases)], dim=-1)


def fourier_table(config: FourierPositions, shape: tuple[int, ...]) -> Tensor:
    """The constant table (prod(shape), C) of a grid, in the model's precision."""
    dtype = torch.float32 if config.arithmetic == "float32" else torch.float64
    table = fourier_features(grid_positions(shape, config.endpoint, dtype), config)
    return table.to(torch.get_default_dtype())


class FourierPositionEncoding(nn.Module):
    """A constant table (M, C) for a grid of ``shape``; not part of the state dict."""

    table: Tensor

    def __init__(self, config: FourierPositions, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("table", fourier_table(config, shape), persistent=False)

    def forward(self) -> Tensor:
        return self.table


class LearnedPositionEncoding(nn.Module):
    """A trained table and its projection -> (M, C). On a 2-D grid that is not the trained one, the table is resized
    bicubically, as transformers' ``interpolate_pos_encoding`` does.
    """

    def __init__(self, config: LearnedPositions, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.trained_shape, self.shape = config.shape, shape
        self.table = nn.Parameter(torch.randn(math.prod(config.shape), config.num_table_channels) * 0.02)
        self.projection: nn.Module = nn.Identity()
        if config.num_projected_channels:
            self.projection = nn.Linear(config.num_table_channels, config.num_projected_channels)

    def forward(self) -> Tensor:
        table: Tensor = self.table
        if self.shape != self.trained_shape:
            grid = table.reshape(*self.trained_shape, -1).permute(2, 0, 1).unsqueeze(0)
            grid = nn.functional.interpolate(grid, size=self.shape, mode="bicubic", align_corners=False)
            table = grid.squeeze(0).flatten(1).T
        encoding: Tensor = self.projection(table)
        return encoding


def position_encoding(config: Positions, shape: tuple[int, ...]) -> nn.Module:
    """The encoding of ``config`` on a grid of ``shape``."""
    if isinstance(config, LearnedPositions):
        return LearnedPositionEncoding(config, shape)
    return FourierPositionEncoding(config, shape)


class ImageAdapter(nn.Module):
    """Images (B, channels, height, width) -> inputs (B, M, C): features, then position."""

    def __init__(self, config: ImageInput) -> None:
        super().__init__()
        self.features = _features(config)
        self.positions = position_encoding(config.positions, config.grid)

    def forward(self, image: Tensor) -> Tensor:
        rows = self.features(image).flatten(2).transpose(1, 2)
        return _beside(rows, self.positions())


def _features(config: ImageInput) -> nn.Module:
    if config.features == "pixels":
        return nn.Identity()
    if config.features == "conv1x1":
        return nn.Conv2d(config.num_channels, config.num_feature_channels, kernel_size=1)
    return ConvDownsample(config.num_channels, config.num_feature_channels, config.padding)


class ConvDownsample(nn.Module):
    """7×7 stride 2 convolution, batch norm, ReLU, 3×3 stride 2 max-pool: (B, 3, H, W) -> (B, C, ~H/4, ~W/4).

    ``same`` pads as TensorFlow and Haiku do (more at the end); ``huggingface`` as transformers' port does.
    """

    def __init__(self, num_channels: int, num_feature_channels: int, padding: str) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(num_channels, num_feature_channels, kernel_size=7, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(num_feature_channels)

    def forward(self, image: Tensor) -> Tensor:
        padding = (3, 3, 3, 3) if self.padding == "huggingface" else _same_padding(image, kernel=7)
        x = torch.relu(self.norm(self.conv(nn.functional.pad(image, padding))))
        if self.padding == "same":
            x = nn.functional.pad(x, _same_padding(x, kernel=3), value=-torch.inf)
        return nn.functional.max_pool2d(x, kernel_size=3, stride=2)


def _same_padding(x: Tensor, kernel: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) so that a stride of 2 gives ceil(size / 2) points; the odd one goes to the end."""
    height, width = x.shape[-2:]
    vertical, horizontal = (max((-(-n // 2) - 1) * 2 + kernel - n, 0) for n in (height, width))
    return horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2


class FramePairAdapter(nn.Module):
    """Two frames (B, 2, 3, H, W) -> inputs (B, H·W, C): features, then position.

    The original cuts 3×3 zero-padded patches and projects the 54 values of both frames. That equals a 3×3 convolution
    over 6 channels, which needs no array nine times as large as the frames.
    """

    def __init__(self, config: FramePairInput) -> None:
        super().__init__()
        self.features = nn.Conv2d(6, config.num_feature_channels, kernel_size=3, padding=1)
        self.positions = position_encoding(config.positions, (config.height, config.width))

    def forward(self, frames: Tensor) -> Tensor:
        features: Tensor = self.features(frames.flatten(1, 2)).flatten(2).transpose(1, 2)
        return _beside(features, self.positions())


class TokenAdapter(nn.Module):
    """Tokens (B, S) -> inputs (B, S, C): embedding plus trained position."""

    def __init__(self, config: TokenInput) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary_size, config.num_input_channels)
        self.positions = nn.Parameter(torch.randn(config.length, config.num_input_channels) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs: Tensor = self.embedding(tokens) + self.positions
        return inputs


class ArrayAdapter(nn.Module):
    """Arrays (B, *shape, channels) -> inputs (B, M, C): values of a patch, then position."""

    def __init__(self, config: ArrayInput) -> None:
        super().__init__()
        self.config = config
        self.projection: nn.Module = nn.Identity()
        if config.num_projected_channels:
            num_values = config.num_channels * math.prod(config.patch)
            self.projection = nn.Linear(num_values, config.num_projected_channels)
        self.positions = position_encoding(config.positions, config.grid) if config.positions is not None else None

    def forward(self, array: Tensor) -> Tensor:
        if self.config.value_positions is not None:
            features = fourier_features(array.flatten(1, -2), self.config.value_positions)
        else:
            rows = space_to_depth(array, self.config.patch) if self.config.patch else array.flatten(1, -2)
            features = self.projection(rows)
        return features if self.positions is None else _beside(features, self.positions())


def space_to_depth(array: Tensor, patch: tuple[int, ...]) -> Tensor:
    """(B, *shape, C) -> (B, M, prod(patch)·C): the values of each patch in order, channels fastest.

    It takes one axis at a time, the last first, so that no rank is above 5 (TensorRT supports 8, others fewer).
    """
    batch, *shape, channels = array.shape
    rest = 1  # patches along the axes that are done
    for axis in reversed(range(len(shape))):
        before, count = math.prod(shape[:axis]), shape[axis] // patch[axis]
        array = array.reshape(-1, count, patch[axis], rest, channels)
        if rest > 1 and patch[axis] > 1:
            array = array.transpose(2, 3)
        rest, channels = rest * count, channels * patch[axis]
        array = array.reshape(batch * before, rest, channels)
    return array


class MaskTokenAdapter(nn.Module):
    """Nothing -> inputs (1, M, C): a modality that is always masked."""

    def __init__(self, config: MaskedInput) -> None:
        super().__init__()
        self.num_inputs = config.num_inputs
        self.token = nn.Parameter(torch.randn(1, config.num_input_channels) * 0.02)

    def forward(self) -> Tensor:
        return self.token.expand(self.num_inputs, -1).unsqueeze(0)


_ADAPTERS: dict[type, Callable[[Any], nn.Module]] = {
    ImageInput: ImageAdapter,
    FramePairInput: FramePairAdapter,
    TokenInput: TokenAdapter,
    ArrayInput: ArrayAdapter,
    MaskedInput: MaskTokenAdapter,
}


def input_adapter(config: Input) -> nn.Module:
    """The adapter of ``config``."""
    return _ADAPTERS[type(config)](config)


def _beside(features: Tensor, positions: Tensor) -> Tensor:
    return torch.cat([features, positions.expand(features.shape[0], -1, -1)], dim=-1)
