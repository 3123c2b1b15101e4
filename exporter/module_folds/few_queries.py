# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of few queries over many inputs, without keys and without values: every encoder, every class query.

W_k moves to the query side and W_v behind the softmax. With C_0 = I − 11ᵀ/C and LayerNorm's γ, β, σ_j:

    a_i = C_0 (γ ∘ W_kᵀ q_i) / √d              score_ij = a_i · x_j / σ_j
    z_i = Σ_j softmax_j(score_ij) x_j / σ_j    output_i = W_o W_v (γ ∘ C_0 z_i) + W_o (W_v β + b_v) + b_o

What does not depend on j cancels in the softmax: b_k and W_k β. Two M × C × D projections disappear. Where the queries
are constants, as an encoder's first latents are, so are a_i and its products with the positions.

The division by σ_j behind the softmax costs a pass over all N × M weights, so it happens inside of it: with
h_ij = softmax_j(score_ij − log σ_j), z_i = Σ_j h_ij x_j / Σ_j h_ij σ_j. Both sums are further columns of products that
are there anyway. (Not with a mask: rows in which nothing is left must still read the mean of the values.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceiver_export.exporter.model.attention import (
    MASKED_SCORE,
    Attention,
    CrossAttention,
    merge_heads,
    split_heads,
    unstacked,
)
from perceiver_export.exporter.module_folds.constants import add_on_grid, read_constants, scores_of
from perceiver_export.exporter.module_folds.deviation import Deviation, Modality


class FewQueriesAttention(nn.Module):
    """Queries (1 or B, N, Q) and the features of each modality, or their values (B, M, C_f | R) -> (B, N, Q), as
    `CrossAttention` gives.

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
        self.deviations = nn.ModuleList(Deviation(one, norm.eps) for one in modalities)
        dtype = norm.weight.dtype
        key = attention.key.weight.detach().double().unflatten(0, (self.num_heads, -1)) * norm.weight.detach()
        key = key / math.sqrt(key.shape[1])
        key = key - key.mean(-1, keepdim=True)  # (h, d, C)
        matrix, offset = _values_to_output(attention, norm)
        if len(self.modalities) == 1:  # several have the channels of these matrices in common
            (modality,) = self.modalities
            key, matrix = modality.over_values(key), modality.over_values(matrix)
            self.modalities = (modality.of_values(),)
        self.register_buffer("key", unstacked(key).to(dtype))
        self.register_buffer("matrix", matrix.transpose(-1, -2).flatten(0, 1).contiguous().to(dtype))
        self.register_buffer("offset", offset.to(dtype))
        self.register_buffer("bias", attention.output.bias.detach())
        if reference.has_mlp:
            self.mlp_norm, self.mlp = reference.mlp_norm, reference.mlp

    def forward(self, queries: Tensor, features: Sequence[Tensor | None], mask: Tensor | None = None) -> Tensor:
        keys = split_heads(self.query(self.query_norm(queries)), self.num_heads) @ self.get_buffer("key")
        inputs = [
            _Input(modality, one, deviation(one), masked=mask is not None)
            for modality, one, deviation in zip(self.modalities, features, self.deviations, strict=True)
        ]
        bias = None if mask is None else (MASKED_SCORE * (1 - mask.to(queries.dtype)))[:, None, None, :]
        count = queries.shape[1]
        chunk = self.chunk or count
        reads = [_read(keys[:, :, start : start + chunk], inputs, bias) for start in range(0, count, chunk)]
        read = torch.cat(reads, dim=1) if len(reads) > 1 else reads[0]
        x = read @ self.get_buffer("matrix") + self.get_buffer("offset")
        if mask is not None and self.masked_rows == "zero":
            x = x * mask.to(x.dtype).amax(dim=-1)[:, None, None]
        x = x + self.get_buffer("bias")
        if self.query_residual:
            x = x + queries
        return x + self.mlp(self.mlp_norm(x)) if self.has_mlp else x


class _Input:
    """One modality of a call: features with columns for σ and, without a mask, σ log σ beside them (B, M, C_f + …)."""

    def __init__(self, modality: Modality, features: Tensor | None, deviation: Tensor, masked: bool) -> None:
        self.modality = modality
        self.inverse = torch.reciprocal(deviation)
        rows = [] if features is None else [features]
        if not masked:
            rows += [deviation.unsqueeze(1), (deviation * torch.log(self.inverse)).unsqueeze(1)]
        self.rows = torch.cat(rows, dim=1) if len(rows) > 1 else rows[0] if rows else None
        self.masked = masked

    def scores(self, keys: Tensor) -> Tensor:
        """score_ij, less log σ_j without a mask: (B, h, n, M)."""
        count, constants = self.modality.num_values, self.modality.constants
        keys = self.modality.over_values(keys)
        own = keys[..., :count]
        if not self.masked:
            own = nn.functional.pad(nn.functional.pad(own, (0, 1)), (0, 1), value=1.0)  # for σ, and for σ log σ
        if self.rows is None:
            scores = torch.zeros(*keys.shape[:-1], constants.num_rows, dtype=keys.dtype)
        else:
            # All heads in one product with the features, which have none.
            scores = (own.flatten(1, 2) @ self.rows).unflatten(1, own.shape[1:3])
        terms = scores_of(constants, keys[..., count:])
        return add_on_grid(scores, terms, constants.shape, self.inverse[:, None, None, :])

    def read(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Σ_j of the weights (B, h, n, M) times x_j (B, h, n, C), and times σ_j (B, h, n, 1) without a mask."""
        own = weights * self.inverse[:, None, None, :] if self.masked else weights
        count, constants = self.modality.num_values, self.modality.constants
        columns = None if self.rows is None else own @ self.rows.transpose(1, 2).unsqueeze(1)
        parts = [] if columns is None or not count else [self.modality.to_features(columns[..., :count])]
        if constants.num_channels:
            parts.append(read_constants(own, constants))
        z = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return z, None if columns is None or self.masked else columns[..., count : count + 1]


def _read(keys: Tensor, inputs: Sequence[_Input], bias: Tensor | None) -> Tensor:
    """z of some queries: a (1 or B, h, n, C) -> (B, n, h·C)."""
    scores = [one.scores(keys) for one in inputs]
    batch = max(part.shape[0] for part in scores) if len(scores) > 1 else 1
    joined = torch.cat([part.expand(batch, -1, -1, -1) for part in scores], -1) if len(scores) > 1 else scores[0]
    weights = torch.softmax(joined if bias is None else joined + bias, dim=-1)
    starts = [0]
    for one in inputs:
        starts.append(starts[-1] + one.modality.constants.num_rows)
    reads = [
        one.read(weights[..., start:stop] if len(inputs) > 1 else weights)
        for one, start, stop in zip(inputs, starts[:-1], starts[1:], strict=True)
    ]
    total, norm = reads[0]
    for z, further in reads[1:]:
        total = total + z
        norm = norm + further if norm is not None and further is not None else None
    return merge_heads(total if norm is None else total / norm)


def _values_to_output(attention: Attention, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """What takes z to the output (Q), in float64: a matrix a head (h, Q, C), and W_o (W_v β + b_v)."""
    heads = attention.num_heads
    value, output = attention.value.weight.detach().double(), attention.output.weight.detach().double()
    per_head = output.unflatten(1, (heads, -1)).transpose(0, 1) @ value.unflatten(0, (heads, -1))
    per_head = per_head * norm.weight.detach()
    matrix = per_head - per_head.mean(-1, keepdim=True)  # (h, Q, C)
    shift = value @ norm.bias.detach().double()
    if attention.value.bias is not None:
        shift = shift + attention.value.bias.detach()
    return matrix, output @ shift
