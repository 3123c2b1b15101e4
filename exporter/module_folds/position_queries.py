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

from perceiver_export.exporter.model.attention import CrossAttention
from perceiver_export.exporter.module_folds.constants import Constants, scores_of
from perceiver_export.exporter.module_folds.many_queries import KeysForQueries


class PositionQueriesAttention(nn.Module):
    """Flat indices (B, O) of grid points, None for all, and latents (B, N, D) -> output rows (B, O, E).

    ``chunk`` is how many points are taken at a time.
    """

    def __init__(
        self, reference: CrossAttention, tail: nn.Module, constants: Constants, chunk: int | None = None
    ) -> None:
        super().__init__()
        self.constants, self.tail, self.chunk = constants, tail, chunk
        self.folded = KeysForQueries(reference)
        mean, square = constants.moments()
        variance = square / constants.num_channels - mean**2
        inverse = torch.rsqrt(variance + reference.query_norm.eps).to(constants.dtype)
        self.register_buffer("inverse", inverse.unsqueeze(1))

    def forward(self, latents: Tensor, indices: Tensor | None) -> Tensor:
        keys, offset, values = self.folded(latents)
        tables = [(axis, term.transpose(-1, -2)) for axis, term in scores_of(self.constants, keys)]
        offset = offset.transpose(-1, -2)
        if indices is None:
            indices = torch.arange(self.constants.num_rows, device=latents.device).unsqueeze(0)
            indices = indices.expand(latents.shape[0], -1)
        if self.chunk is None or not isinstance(indices.shape[1], int):
            return self._rows(indices, tables, offset, values)
        starts = range(0, indices.shape[1], self.chunk)
        rows = [self._rows(indices[:, start : start + self.chunk], tables, offset, values) for start in starts]
        return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]

    def _rows(
        self, indices: Tensor, tables: list[tuple[int | str | None, Tensor]], offset: Tensor, values: Tensor
    ) -> Tensor:
        shape = self.constants.shape
        scores: Tensor | None = None
        for axis, table in tables:
            own = table  # (B, h, size, N)
            if isinstance(axis, int):
                stride = math.prod(shape[axis + 1 :])
                own = _at(table, torch.remainder(torch.div(indices, stride, rounding_mode="floor"), shape[axis]))
            scores = own if scores is None else scores + own
        assert scores is not None
        scale = nn.functional.embedding(indices, self.get_buffer("inverse"))  # (B, O, 1)
        x = self.folded.read(scores * scale.unsqueeze(1) + offset, values)
        rows: Tensor = self.tail(x)
        return rows


def _at(table: Tensor, points: Tensor) -> Tensor:
    """Rows ``points`` (B, O) of a table (B, h, size, N) -> (B, h, O, N)."""
    batch, heads, size, count = table.shape
    flat = table.transpose(1, 2).reshape(batch * size, heads * count)
    offsets = torch.arange(batch, device=points.device).unsqueeze(1) * size
    rows = nn.functional.embedding(points + offsets, flat)
    apart: Tensor = rows.unflatten(-1, (heads, count)).transpose(1, 2)
    return apart
