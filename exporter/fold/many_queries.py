# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of many inputs, as queries, into few latents: optical flow's decoder.

Keys and values come from N latents, queries from M inputs x_j = [f_j, p_j]. So the query's projection and LayerNorm go
into the keys, and the output's projection into the values, once per call (notation as in `few_queries`):

    b_k = C_0 (γ ∘ W_qᵀ k_k) / √d        c_k = (W_q β + b_q) · k_k / √d
    score_jk = b_k · x_j / σ_j + c_k       v'_k = W_o v_k

No M × C × D projection is left, and the positions' part of the scores is again one small table an axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceiver_export.exporter.fold.constants import scores_of
from perceiver_export.exporter.fold.deviation import InverseDeviation, Modality
from perceiver_export.exporter.fold.tails import LinearTail
from perceiver_export.exporter.perceiver.attention import CrossAttention, split_heads


class KeysForQueries(nn.Module):
    """Latents (B, N, D) -> b (B, h, N, C), c (B, h, 1, N) and values as wide as the queries, v' (B, h, N, C)."""

    def __init__(self, reference: CrossAttention) -> None:
        super().__init__()
        attention, norm = reference.attention, reference.query_norm
        self.num_heads = attention.num_heads
        self.input_norm, self.key, self.value = reference.input_norm, attention.key, attention.value
        query = attention.query.weight.unflatten(0, (self.num_heads, -1))
        scale = 1 / math.sqrt(query.shape[1])
        shift = attention.query.weight @ norm.bias
        if attention.query.bias is not None:
            shift = shift + attention.query.bias
        weighted = query * norm.weight * scale
        self.register_buffer("query", weighted - weighted.mean(-1, keepdim=True))  # (h, d, C), centred
        self.register_buffer("shift", shift.unflatten(0, (self.num_heads, -1)).unsqueeze(-1) * scale)
        output = attention.output.weight.unflatten(1, (self.num_heads, -1)).permute(1, 2, 0)
        self.register_buffer("output", output.contiguous())
        self.register_buffer("bias", attention.output.bias.detach())

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.input_norm(latents)
        keys = split_heads(self.key(normed), self.num_heads)
        values = split_heads(self.value(normed), self.num_heads)
        offset = (keys @ self.get_buffer("shift")).transpose(-1, -2)
        return keys @ self.get_buffer("query"), offset, values @ self.get_buffer("output")


class InputQueriesAttention(nn.Module):
    """Features (B, M, C_f) of the queries and latents (B, N, D) -> output rows (B, M, E).

    ``chunk`` is how many steps along the grid's first axis are taken at a time.
    """

    def __init__(
        self, reference: CrossAttention, tail: LinearTail, modality: Modality, chunk: int | None = None
    ) -> None:
        super().__init__()
        self.modality, self.tail = modality, tail
        self.chunk = chunk or modality.constants.shape[0]
        self.query_residual = reference.query_residual
        self.folded = KeysForQueries(reference)
        self.deviation = InverseDeviation(modality, reference.query_norm.eps)
        if self.query_residual:
            self.register_buffer("constants", modality.constants.table())

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        weights, offset, values = self.folded(latents)
        inverse = self.deviation(features)
        count, shape = self.modality.num_features, self.modality.constants.shape
        terms = [
            (axis, term.transpose(-1, -2)) for axis, term in scores_of(self.modality.constants, weights[..., count:])
        ]
        keys = weights[..., :count].transpose(-1, -2)
        step = math.prod(shape[1:])
        rows = []
        for start in range(0, shape[0], self.chunk):
            stop = min(start + self.chunk, shape[0])
            own = slice(start * step, stop * step)
            scores = features[:, own].unsqueeze(1) @ keys  # (B, h, m, N)
            scores = self._add_terms(scores, terms, start, stop) * inverse[:, None, own, None] + offset
            x = (torch.softmax(scores, dim=-1) @ values).sum(1) + self.folded.get_buffer("bias")
            if self.query_residual:
                x = x + self._queries(features, own)
            rows.append(self.tail(x))
        return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]

    def _add_terms(
        self, scores: Tensor, terms: Sequence[tuple[int | str | None, Tensor]], start: int, stop: int
    ) -> Tensor:
        """Add each term (B, h, size, N) along its axis to the scores of steps ``start`` to ``stop``."""
        shape = self.modality.constants.shape
        grid = scores.unflatten(2, (stop - start, *shape[1:]))
        for axis, term in terms:
            if axis == "grid":
                grid = grid + term.unflatten(2, shape)[:, :, start:stop]
                continue
            sizes = [1] * len(shape)
            if isinstance(axis, int):
                sizes[axis] = shape[axis]
            view = term.unflatten(2, sizes)
            grid = grid + (view[:, :, start:stop] if axis == 0 else view)
        flat: Tensor = grid.flatten(2, -2)
        return flat

    def _queries(self, features: Tensor, own: slice) -> Tensor:
        part = features[:, own]
        return torch.cat([part, self.get_buffer("constants")[own].expand(part.shape[0], -1, -1)], dim=-1)
