# SPDX-License-Identifier: Apache-2.0
"""Decoders: queries read the latents (Perceiver IO), or the latents are averaged (the first Perceiver).

Source: Perceiver IO (arXiv 2107.14795), section 3.2; Perceiver (arXiv 2103.03206), section 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perceiver_export.exporter.perceiver.attention import CrossAttention
from perceiver_export.exporter.perceiver.config import (
    Activation,
    AverageDecoder,
    LearnedQueries,
    PositionQueries,
    QueryDecoder,
)
from perceiver_export.exporter.perceiver.positions import fourier_table


class LearnedQueryTable(nn.Module):
    """Trained queries: all of them (1, O, F), or those of ``indices`` (B, Q) -> (B, Q, F)."""

    def __init__(self, config: LearnedQueries) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(config.num_queries, config.num_channels) * 0.02)

    def forward(self, indices: Tensor | None) -> Tensor:
        return self.table.unsqueeze(0) if indices is None else nn.functional.embedding(indices, self.table)


class PositionQueryTable(nn.Module):
    """Fourier features of grid points: all (1, O, F), or those of flat ``indices`` (B, Q) -> (B, Q, F).

    Fourier features are separable: one small table an axis, not one row a point (800,000 for a video).
    """

    def __init__(self, config: PositionQueries) -> None:
        super().__init__()
        self.shape, self.num_bands = config.shape, config.positions.num_bands
        self.axis_by_axis = config.positions.order == "axis-by-axis"
        for axis, size in enumerate(config.shape):
            resolution = (config.positions.max_resolution[axis],)
            one_axis = type(config.positions)(
                self.num_bands, resolution, config.positions.endpoint, arithmetic=config.positions.arithmetic
            )
            self.register_buffer(f"axis_{axis}", fourier_table(one_axis, (size,)), persistent=False)

    def axis_table(self, axis: int) -> Tensor:
        """Features of one axis's points (size, 2K+1): position, sines, cosines."""
        table = self.get_buffer(f"axis_{axis}")
        return torch.cat([table[:, 1:], table[:, :1]], dim=1) if self.axis_by_axis else table

    def forward(self, indices: Tensor | None) -> Tensor:
        if indices is None:
            device = self.get_buffer("axis_0").device
            indices = torch.arange(math.prod(self.shape), device=device).unsqueeze(0)
        rows, stride = [], math.prod(self.shape)
        for axis, size in enumerate(self.shape):
            stride //= size
            points = torch.remainder(torch.div(indices, stride, rounding_mode="floor"), size)
            rows.append(nn.functional.embedding(points, self.get_buffer(f"axis_{axis}")))
        k = self.num_bands
        if self.axis_by_axis:
            return torch.cat([part for row in rows for part in (row[..., 1:], row[..., :1])], dim=-1)
        columns = (slice(0, 1), slice(1, 1 + k), slice(1 + k, None))  # positions, sines, cosines
        return torch.cat([row[..., column] for column in columns for row in rows], dim=-1)


def input_queries(inputs: Tensor, indices: Tensor | None) -> Tensor:
    """The inputs themselves (B, M, C), or their rows of ``indices`` (B, Q) -> (B, Q, C)."""
    if indices is None:
        return inputs
    batch, count, channels = inputs.shape
    offsets = torch.arange(batch, device=inputs.device).unsqueeze(1) * count
    return nn.functional.embedding(indices + offsets, inputs.reshape(-1, channels))


class PerceiverDecoder(nn.Module):
    """Queries (1 or B, O, F) read latents (B, N, D) -> output rows (B, O, E) of one of the outputs."""

    def __init__(
        self, config: QueryDecoder, num_latent_channels: int, activation: Activation, vocabulary_size: int | None
    ) -> None:
        super().__init__()
        width = config.num_query_channels
        self.queries = nn.ModuleDict()
        self.paddings = nn.ParameterDict()
        self.heads = nn.ModuleDict()
        for name, output in config.outputs.items():
            if isinstance(output.queries, LearnedQueries):
                self.queries[name] = LearnedQueryTable(output.queries)
            if isinstance(output.queries, PositionQueries):
                self.queries[name] = PositionQueryTable(output.queries)
            if output.queries.num_channels < width:
                self.paddings[name] = nn.Parameter(torch.randn(1, width - output.queries.num_channels) * 0.02)
            if output.num_channels:
                self.heads[name] = nn.Linear(config.num_output_channels or width, output.num_channels)
        self.cross_attention = CrossAttention(
            config.cross_attention, width, num_latent_channels, activation, mlp=config.mlp
        )
        self.output = nn.Linear(width, config.num_output_channels) if config.num_output_channels else nn.Identity()
        self.embedding_bias = nn.Parameter(torch.zeros(vocabulary_size)) if vocabulary_size is not None else None

    def forward(
        self,
        latents: Tensor,
        name: str,
        queries: Tensor,
        query_mask: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor:
        if name in self.paddings:
            padding = self.paddings[name].expand(*queries.shape[:-1], -1)
            queries = torch.cat([queries, padding], dim=-1)
        rows: Tensor = self.output(self.cross_attention(queries, latents, query_mask=query_mask))
        if name in self.heads:
            rows = self.heads[name](rows)
        if embedding is not None and self.embedding_bias is not None:
            rows = torch.matmul(rows, embedding.T) + self.embedding_bias
        return rows


class AverageHead(nn.Module):
    """Latents (B, N, D) -> outputs (B, E): mean over the latents, then a linear layer."""

    def __init__(self, config: AverageDecoder, num_latent_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_latent_channels) if config.norm else nn.Identity()
        self.output = nn.Linear(num_latent_channels, config.num_output_channels)

    def forward(self, latents: Tensor) -> Tensor:
        outputs: Tensor = self.output(self.norm(latents.mean(dim=1)))
        return outputs
