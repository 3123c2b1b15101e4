# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of few queries over many inputs, without keys and without values: every encoder, every class query.

W_k moves to the query side and W_v behind the softmax. With C_0 = I − 11ᵀ/C and LayerNorm's γ, β, σ_j:

    a_i = C_0 (γ ∘ W_kᵀ q_i) / √d              score_ij = a_i · x_j / σ_j
    z_i = Σ_j softmax_j(score_ij) x_j / σ_j    output_i = W_o W_v (γ ∘ C_0 z_i) + W_o (W_v β + b_v) + b_o

What does not depend on j cancels in the softmax: b_k and W_k β. Two M × C × D projections disappear. Where the queries
are constants, as an encoder's first latents are, so are a_i and its products with the positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceiver_export.exporter.fold.constants import add_on_grid, read_constants, scores_of
from perceiver_export.exporter.fold.deviation import InverseDeviation, Modality
from perceiver_export.exporter.perceiver.attention import Attention, CrossAttention, merge_heads, split_heads


class FewQueriesAttention(nn.Module):
    """Queries (1 or B, N, Q) and the features (B, M, C_f) of each modality -> (B, N, Q), as `CrossAttention` gives.

    ``mask`` (B, M) leaves out inputs of all modalities, in their order. ``chunk`` is how many queries are taken at a
    time: the rows of a softmax do not depend on each other, so the result is the same and the memory less.
    """

    def __init__(self, reference: CrossAttention, modalities: Sequence[Modality], chunk: int | None = None) -> None:
        super().__init__()
        attention, norm = reference.attention, reference.input_norm
        self.modalities, self.chunk = tuple(modalities), chunk
        self.num_heads, self.masked_rows = attention.num_heads, attention.masked_rows
        self.query_residual, self.has_mlp = reference.query_residual, reference.has_mlp
        self.query_norm, self.query = reference.query_norm, attention.query
        self.deviations = nn.ModuleList(InverseDeviation(one, norm.eps) for one in modalities)
        key = attention.key.weight.unflatten(0, (self.num_heads, -1)) * norm.weight
        key = key / math.sqrt(key.shape[1])
        self.register_buffer("key", key - key.mean(-1, keepdim=True))  # (h, d, C)
        matrix, offset = _values_to_output(attention, norm)
        self.register_buffer("matrix", matrix)
        self.register_buffer("offset", offset)
        self.register_buffer("bias", attention.output.bias.detach())
        if reference.has_mlp:
            self.mlp_norm, self.mlp = reference.mlp_norm, reference.mlp

    def forward(self, queries: Tensor, features: Sequence[Tensor | None], mask: Tensor | None = None) -> Tensor:
        keys = split_heads(self.query(self.query_norm(queries)), self.num_heads) @ self.get_buffer("key")
        inverse = [deviation(one) for deviation, one in zip(self.deviations, features, strict=True)]
        bias = None if mask is None else (-1e30 * (1 - mask.to(queries.dtype)))[:, None, None, :]
        count = queries.shape[1]
        chunk = self.chunk or count
        reads = [
            self._read(keys[:, :, start : start + chunk], features, inverse, bias) for start in range(0, count, chunk)
        ]
        read = torch.cat(reads, dim=1) if len(reads) > 1 else reads[0]
        x = read @ self.get_buffer("matrix") + self.get_buffer("offset")
        if mask is not None and self.masked_rows == "zero":
            x = x * mask.to(x.dtype).amax(dim=-1)[:, None, None]
        x = x + self.get_buffer("bias")
        if self.query_residual:
            x = x + queries
        return x + self.mlp(self.mlp_norm(x)) if self.has_mlp else x

    def _read(
        self, keys: Tensor, features: Sequence[Tensor | None], inverse: Sequence[Tensor], bias: Tensor | None
    ) -> Tensor:
        """z of some queries: a (1 or B, h, n, C) -> (B, n, h·C)."""
        scores = [
            self._scores(keys, modality, one, scale)
            for modality, one, scale in zip(self.modalities, features, inverse, strict=True)
        ]
        batch = max(part.shape[0] for part in scores) if len(scores) > 1 else 1
        joined = torch.cat([p.expand(batch, -1, -1, -1) for p in scores], -1) if len(scores) > 1 else scores[0]
        weights = torch.softmax(joined if bias is None else joined + bias, dim=-1)
        total, start = None, 0
        for modality, one, scale in zip(self.modalities, features, inverse, strict=True):
            stop = start + modality.constants.num_rows
            own = weights[..., start:stop] * scale[:, None, None, :]
            start = stop
            parts = [] if one is None else [own @ one.unsqueeze(1)]
            if modality.constants.num_channels:
                parts.append(read_constants(own, modality.constants))
            z = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
            total = z if total is None else total + z
        assert total is not None
        return merge_heads(total)

    def _scores(self, keys: Tensor, modality: Modality, features: Tensor | None, inverse: Tensor) -> Tensor:
        """(B, h, n, M)."""
        terms = scores_of(modality.constants, keys[..., modality.num_features :])
        if features is None:
            scores = torch.zeros(*keys.shape[:-1], modality.constants.num_rows, dtype=keys.dtype)
        else:
            own = keys[..., : modality.num_features]
            # All heads in one product with the features, which have none.
            scores = (own.flatten(1, 2) @ features.transpose(-1, -2)).unflatten(1, own.shape[1:3])
        return add_on_grid(scores, terms, modality.constants.shape) * inverse[:, None, None, :]


def _values_to_output(attention: Attention, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """What takes z (h·C) to the output (Q): the matrix (h·C, Q), and W_o (W_v β + b_v)."""
    heads, value, output = attention.num_heads, attention.value, attention.output
    per_head = output.weight.unflatten(1, (heads, -1)).transpose(0, 1) @ value.weight.unflatten(0, (heads, -1))
    per_head = per_head * norm.weight
    matrix = per_head - per_head.mean(-1, keepdim=True)  # (h, Q, C)
    shift = value.weight @ norm.bias
    if value.bias is not None:
        shift = shift + value.bias
    return matrix.transpose(-1, -2).flatten(0, 1).contiguous(), output.weight @ shift
