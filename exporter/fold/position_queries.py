# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of grid points, as queries, into few latents: the video decoder.

The algebra is that of `many_queries`, and nothing of a query changes: its LayerNorm's σ_j is known at export, and its
scores are sums of one row for each axis,

    score_jk = (U_k(t) + V_k(y) + W_k(x) + b_k · padding) / σ_j + c_k

so the M × N × C product of queries and keys becomes additions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perceiver_export.exporter.fold.constants import Constants, scores_of
from perceiver_export.exporter.fold.many_queries import KeysForQueries
from perceiver_export.exporter.fold.tails import LinearTail
from perceiver_export.exporter.perceiver.attention import CrossAttention


class PositionQueriesAttention(nn.Module):
    """Flat indices (B, O) of grid points, None for all, and latents (B, N, D) -> output rows (B, O, E)."""

    def __init__(self, reference: CrossAttention, tail: LinearTail, constants: Constants) -> None:
        super().__init__()
        self.constants, self.tail = constants, tail
        self.folded = KeysForQueries(reference)
        self.register_buffer("inverse", _inverse_deviations(constants, reference.query_norm.eps))

    def forward(self, latents: Tensor, indices: Tensor | None) -> Tensor:
        weights, offset, values = self.folded(latents)
        shape = self.constants.shape
        if indices is None:
            indices = torch.arange(math.prod(shape), device=latents.device).unsqueeze(0).expand(latents.shape[0], -1)
        scores: Tensor | None = None
        for axis, term in scores_of(self.constants, weights):
            own = term.transpose(-1, -2)  # (B, h, size, N)
            if isinstance(axis, int):
                stride = math.prod(shape[axis + 1 :])
                points = torch.remainder(torch.div(indices, stride, rounding_mode="floor"), shape[axis])
                own = _rows(own, points)
            scores = own if scores is None else scores + own
        assert scores is not None
        scale = nn.functional.embedding(indices, self.get_buffer("inverse").unsqueeze(1))  # (B, O, 1)
        scores = scores * scale.unsqueeze(1) + offset
        x = (torch.softmax(scores, dim=-1) @ values).sum(1) + self.folded.get_buffer("bias")
        rows: Tensor = self.tail(x)
        return rows


def _rows(table: Tensor, points: Tensor) -> Tensor:
    """Rows ``points`` (B, O) of a table (B, h, size, N) -> (B, h, O, N)."""
    batch, heads, size, count = table.shape
    flat = table.transpose(1, 2).reshape(batch * size, heads * count)
    offsets = torch.arange(batch, device=points.device).unsqueeze(1) * size
    rows = nn.functional.embedding(points + offsets, flat)
    apart: Tensor = rows.unflatten(-1, (heads, count)).transpose(1, 2)
    return apart


def _inverse_deviations(constants: Constants, eps: float) -> Tensor:
    """1/σ_j of every point (M,), from sums along each axis: the table of all points need not exist."""
    grid = [1] * len(constants.shape)
    total = torch.zeros(grid, dtype=torch.float64)
    square = torch.zeros(grid, dtype=torch.float64)
    dtype = torch.get_default_dtype()
    for term in constants.terms:
        sizes = list(grid)
        if isinstance(term.axis, int):
            sizes[term.axis] = constants.shape[term.axis]
        exact, dtype = term.table.double(), term.table.dtype
        total = total + exact.sum(1).reshape(sizes)
        square = square + (exact**2).sum(1).reshape(sizes)
    mean = total / constants.num_channels
    variance = square / constants.num_channels - mean**2
    return torch.rsqrt(variance + eps).expand(constants.shape).reshape(-1).to(dtype)
