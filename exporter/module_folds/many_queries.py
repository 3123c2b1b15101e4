# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of many inputs, as queries, into few latents: optical flow's decoder.

Keys and values come from N latents, queries from M inputs x_j = [f_j, p_j]. So the query's projection and LayerNorm go
into the keys, and the output's projection into the values, once per call (notation as in `few_queries`):

    b_k = C_0 (γ ∘ W_qᵀ k_k) / √d        c_k = (W_q β + b_q) · k_k / √d
    score_jk = b_k · x_j / σ_j + c_k       v'_k = W_o v_k

No M × C × D projection is left, and the positions' part of the scores is again one small table an axis. That of the
first axis, and c_k, are further columns of the product with the features: inputs are [f_j, 1, σ_j], and each step along
that axis has its own keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perceiver_export.exporter.model.attention import CrossAttention, split_heads, unstacked
from perceiver_export.exporter.module_folds.constants import scores_of
from perceiver_export.exporter.module_folds.deviation import Deviation, Modality


class KeysForQueries(nn.Module):
    """Latents (B, N, D) -> b (B, h, N, C), c (B, h, N, 1) and values as wide as the queries, v' (B, h, N, C).

    ``modality``: the queries, where b is to be multiplied with their values instead of their features.
    """

    def __init__(self, reference: CrossAttention, modality: Modality | None = None) -> None:
        super().__init__()
        attention, norm = reference.attention, reference.query_norm
        self.num_heads, dtype = attention.num_heads, norm.weight.dtype
        self.input_norm, self.key, self.value = reference.input_norm, attention.key, attention.value
        weight = attention.query.weight.detach().double()
        shift = weight @ norm.bias.detach().double()
        if attention.query.bias is not None:
            shift = shift + attention.query.bias.detach()
        query = weight.unflatten(0, (self.num_heads, -1)) * norm.weight.detach()
        scale = 1 / math.sqrt(query.shape[1])
        query = query - query.mean(-1, keepdim=True)  # (h, d, C)
        if modality is not None:
            query = modality.over_values(query)
        query = torch.cat([query, shift.unflatten(0, (self.num_heads, -1, 1))], dim=-1)  # c beside b
        self.register_buffer("query", unstacked(query * scale).to(dtype))
        output = attention.output.weight.detach().unflatten(1, (self.num_heads, -1)).permute(1, 2, 0)
        self.register_buffer("output", unstacked(output).contiguous())
        self.register_buffer("bias", attention.output.bias.detach())

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.input_norm(latents)
        keys = split_heads(self.key(normed), self.num_heads) @ self.get_buffer("query")
        values = split_heads(self.value(normed), self.num_heads) @ self.get_buffer("output")
        return keys[..., :-1], keys[..., -1:], values

    def read(self, scores: Tensor, values: Tensor) -> Tensor:
        """softmax(scores (…, h, m, N)) times values (…, h, N, C), summed over the heads: (…, m, C)."""
        read = torch.softmax(scores, dim=-1) @ values
        return (read.sum(-3) if self.num_heads > 1 else read.squeeze(-3)) + self.get_buffer("bias")


class InputQueriesAttention(nn.Module):
    """Features (B, C_f, M) of the queries and latents (B, N, D) -> output rows (B, M, E).

    ``chunk`` is how many steps along the grid's first axis are taken at a time.
    """

    def __init__(
        self, reference: CrossAttention, tail: nn.Module, modality: Modality, chunk: int | None = None
    ) -> None:
        super().__init__()
        self.modality, self.tail = modality, tail
        shape = modality.constants.shape
        self.steps, self.inner = (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
        self.chunk = chunk or self.steps
        self.query_residual = reference.query_residual
        self.folded = KeysForQueries(reference, modality)
        self.deviation = Deviation(modality, reference.query_norm.eps)
        if self.query_residual:
            self.register_buffer("constants", modality.constants.table())

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        keys, offset, values = self.folded(latents)
        count = self.modality.num_values
        rows, terms = self._constant_scores(keys[..., count:], offset)
        deviation = self.deviation(features).unsqueeze(1)
        ones = [] if self.modality.basis is not None else [torch.ones_like(deviation)]
        columns = torch.cat([features, *ones, deviation], dim=1).transpose(1, 2)
        inverse = torch.reciprocal(deviation).transpose(1, 2)
        keys = keys[..., :count].transpose(-1, -2).unsqueeze(1)  # (B, 1, h, C_f | R, N)
        if self.modality.basis is not None:
            keys, rows = keys[..., :-1, :], rows + keys[..., -1:, :]
        offset = offset.transpose(-1, -2).unsqueeze(1)
        step, outputs = math.prod(self.inner), []
        for start in range(0, self.steps, self.chunk):
            stop = min(start + self.chunk, self.steps)
            own, size = slice(start * step, stop * step), stop - start
            parts = [keys, _steps(rows, start, stop), offset]
            stepwise = torch.cat([part.expand(-1, size, -1, -1, -1) for part in parts], dim=-2)
            scores = columns[:, own].unflatten(1, (size, 1, step)) @ stepwise  # (B, size, h, step, N)
            for axis, term in terms:
                scores = self._add(scores, axis, _steps(term, start, stop))
            scores = scores * inverse[:, own].unflatten(1, (size, 1, step))
            x = self.folded.read(scores, values.unsqueeze(1)).flatten(1, 2)
            if self.query_residual:
                x = x + self._queries(features, own)
            outputs.append(self.tail(x))
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _constant_scores(self, keys: Tensor, offset: Tensor) -> tuple[Tensor, list[tuple[int | None, Tensor]]]:
        """The constants' scores: a row for each step (B, steps or 1, h, 1, N), and what varies within a step.

        The latter is (axis within a step, (B, 1 or steps, h, size, N)); axis None is all of a step.
        """
        rows = torch.zeros_like(offset.transpose(-1, -2)).unsqueeze(1)
        terms: list[tuple[int | None, Tensor]] = []
        several = len(self.modality.constants.shape) > 1
        for axis, scores in scores_of(self.modality.constants, keys):
            term = scores.transpose(-1, -2)  # (B, h, size, N)
            if axis is None:
                rows = rows + term.unsqueeze(1)
            elif axis == 0 and several:
                rows = rows + term.transpose(1, 2).unsqueeze(3)
            elif axis == "grid":
                terms.append((None, term.unflatten(2, (self.steps, -1)).transpose(1, 2)))
            else:
                assert isinstance(axis, int)
                terms.append((axis - several, term.unsqueeze(1)))
        return rows, terms

    def _add(self, scores: Tensor, axis: int | None, term: Tensor) -> Tensor:
        """Add a term to scores (B, size, h, step, N), along one axis within a step or along all of it."""
        if axis is None or len(self.inner) == 1:
            return scores + term
        sizes = [1] * len(self.inner)
        sizes[axis] = self.inner[axis]
        added: Tensor = (scores.unflatten(3, self.inner) + term.unflatten(3, sizes)).flatten(3, -2)
        return added

    def _queries(self, features: Tensor, own: slice) -> Tensor:
        part = features.transpose(1, 2)[:, own]
        return torch.cat([part, self.get_buffer("constants")[own].expand(part.shape[0], -1, -1)], dim=-1)


def _steps(term: Tensor, start: int, stop: int) -> Tensor:
    """What belongs to some steps; a term (B, 1, …) is the same for all of them."""
    return term if term.shape[1] == 1 else term[:, start:stop]
