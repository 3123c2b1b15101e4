# SPDX-License-Identifier: Apache-2.0
"""Position encodings, computed once when the model is built: nothing of them is left to do at inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perceiver_export.exporter.perceiver.config import FourierPositions, LearnedPositions, Positions


def axis_positions(size: int, endpoint: bool, dtype: torch.dtype) -> Tensor:
    """Coordinates of ``size`` points on one axis: linspace(-1, 1), or -1 + 2 i / size."""
    if endpoint:
        return torch.linspace(-1.0, 1.0, size, dtype=dtype)
    return -1 + 2 * torch.arange(size, dtype=dtype) / size


def grid_positions(shape: tuple[int, ...], endpoint: bool, dtype: torch.dtype) -> Tensor:
    """Coordinates of every point of a grid, first axis slowest: (prod(shape), len(shape))."""
    axes = [axis_positions(size, endpoint, dtype) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def fourier_features(positions: Tensor, config: FourierPositions) -> Tensor:
    """Fourier features of positions (…, A) -> (…, A·(2K+1)).

    Perceiver IO, appendix D: sin(π f_k p) and cos(π f_k p), f_k linear from 1 to max_resolution/2. The order of the
    operations is transformers', so that float32 tables come out bit-equal to it.
    """
    bands = torch.stack(
        [
            torch.linspace(1.0, size / 2, config.num_bands, dtype=positions.dtype, device=positions.device)
            for size in config.max_resolution
        ]
    )
    phases = math.pi * (positions[..., :, None] * bands)
    if config.order == "axis-by-axis":
        parts = torch.cat([torch.sin(phases), torch.cos(phases), positions[..., :, None]], dim=-1)
        return parts.flatten(-2)
    phases = phases.flatten(-2)
    return torch.cat([positions, torch.sin(phases), torch.cos(phases)], dim=-1)


def fourier_channels(config: FourierPositions, num_axes: int, axis: int) -> list[int]:
    """Which channels of the features belong to an axis, in the order of `fourier_features` of that axis alone."""
    bands = config.num_bands
    if config.order == "axis-by-axis":
        return list(range(axis * (2 * bands + 1), (axis + 1) * (2 * bands + 1)))
    sines, cosines = num_axes + axis * bands, num_axes * (1 + bands) + axis * bands
    return [axis, *range(sines, sines + bands), *range(cosines, cosines + bands)]


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
        self.config, self.shape = config, shape
        self.register_buffer("table", fourier_table(config, shape), persistent=False)

    def forward(self) -> Tensor:
        return self.table


class LearnedPositionEncoding(nn.Module):
    """A trained table and its projection -> (M, C). On another 2-D grid than it was trained for, the table is resized
    bicubically, as transformers' ``interpolate_pos_encoding`` does.
    """

    def __init__(self, config: LearnedPositions, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.trained_shape, self.shape = config.shape, shape
        self.table = nn.Parameter(torch.randn(math.prod(config.shape), config.num_table_channels) * 0.02)
        self.projection = (
            nn.Linear(config.num_table_channels, config.num_projected_channels)
            if config.num_projected_channels
            else nn.Identity()
        )

    def forward(self) -> Tensor:
        table: Tensor = self.table
        if self.shape != self.trained_shape:
            grid = table.reshape(*self.trained_shape, -1).permute(2, 0, 1).unsqueeze(0)
            grid = nn.functional.interpolate(grid, size=self.shape, mode="bicubic", align_corners=False)
            table = grid.squeeze(0).flatten(1).T
        encoding: Tensor = self.projection(table)
        return encoding


def position_encoding(config: Positions, shape: tuple[int, ...]) -> nn.Module:
    """The encoding that ``config`` asks for, on a grid of ``shape``."""
    if isinstance(config, LearnedPositions):
        return LearnedPositionEncoding(config, shape)
    return FourierPositionEncoding(config, shape)
