# SPDX-License-Identifier: Apache-2.0
"""The two layers of a Perceiver, cross-attention and self-attention, each with an MLP, and the MLP's activations.

Source: Perceiver IO (arXiv 2107.14795), section 3.1 and appendix E. All layers are pre-norm; LayerNorm's epsilon is
1e-5 in DeepMind's code and in transformers, whatever a config says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_export.exporter.model.config import Activation, AttentionConfig, MaskedRows

# The functions of transformers' `activations.py`, in operators that every engine supports.
_ELEMENTWISE: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "gelu-clipped": lambda x: torch.clip(F.gelu(x), -10, 10),
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "relu6": lambda x: torch.clip(x, 0, 6),
    "relu-squared": lambda x: torch.square(torch.relu(x)),
    "leaky-relu": F.leaky_relu,
    "silu": lambda x: x * torch.sigmoid(x),
    "hardswish": lambda x: x * torch.clip(x + 3, 0, 6) / 6,
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "sqrt-softplus": lambda x: torch.sqrt(F.softplus(x)),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    # MEGA's, with its constants (arXiv 2209.10655)
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "linear": lambda x: x,
}


class Elementwise(nn.Module):
    """An elementwise activation: (…, W) -> (…, W)."""

    def __init__(self, name: Activation) -> None:
        super().__init__()
        self.function = _ELEMENTWISE[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# Low enough that the softmax gives an exact zero, and that adding any score does not change it.
MASKED_SCORE = -1e30
LARGEST_SCORES = 1 << 25  # numbers that torch holds at a time
LARGEST_ROWS = 1 << 22  # numbers; with smaller pieces, a decoder would project its latents too often


def by_rows(function: Callable[[Tensor], Sequence[Tensor]], rows: Tensor) -> Sequence[Tensor]:
    """Apply ``function`` to each row of (B, M, C). In eager PyTorch it gets some rows at a time: for all rows of the
    flow model, each intermediate tensor would take 240 MB.
    """
    if _is_traced() or torch.is_grad_enabled() or rows.is_meta or rows.numel() <= LARGEST_ROWS:
        return function(rows)
    step = max(1, LARGEST_ROWS // (rows.shape[0] * rows.shape[2]))
    results: list[Tensor] = []
    for at in range(0, rows.shape[1], step):
        found = function(rows[:, at : at + step])
        results = results or [one.new_empty(one.shape[0], rows.shape[1], one.shape[2]) for one in found]
        for one, result in zip(found, results, strict=True):
            result[:, at : at + step] = one
    return results


def _is_traced() -> bool:
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    masked_rows: MaskedRows = "mean",
) -> Tensor:
    """Multi-head attention, softmax(QKᵀ/√d)V: (B, N, E), (B, M, E), (B, M, V) -> (B, N, V).

    The batch of ``queries`` may be 1 where that of keys and values is larger (latents, learned queries). ``mask``
    (B, M) is 1 for a key and 0 for a masked one. If a sample has no keys, its queries read the ``mean`` of all values
    (transformers) or ``zero`` (DeepMind).
    """
    q, k, v = (split_heads(x, num_heads) for x in (queries, keys, values))
    bias = None if mask is None else (MASKED_SCORE * (1 - mask.to(q.dtype)))[:, None, None, :]
    # The CPU's fused attention keeps no scores but has a slow backward pass: small products train faster.
    slow = q.is_cpu and torch.is_grad_enabled() and q.shape[2] * k[..., 0].numel() <= LARGEST_SCORES
    read = merge_heads((_products if _is_traced() or slow else _fused)(q, k, v, bias))
    if mask is not None and masked_rows == "zero":
        read = read * mask.to(read.dtype).amax(dim=-1)[:, None, None]
    return read


def _products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention in the operators of exported graphs."""
    # Scaling queries takes N × d products, scaling scores N × M; constant queries are scaled at export.
    scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores if bias is None else scores + bias, dim=-1), v)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention in eager PyTorch, whose kernel keeps no scores: the flow model's would take 1.5 GB."""
    batch = max(x.shape[0] for x in (q, k, v, *(() if bias is None else (bias,))))
    q, k, v = (x.expand(batch, -1, -1, -1) for x in (q, k, v))
    rows = q.shape[2]
    if q.shape[-1] != v.shape[-1]:  # torch has no such kernel, and would keep all scores
        rows = max(1, LARGEST_SCORES // (batch * k.shape[1] * k.shape[2]))
    reads = [F.scaled_dot_product_attention(piece, k, v, bias) for piece in q.split(rows, dim=2)]
    return torch.cat(reads, dim=2) if len(reads) > 1 else reads[0]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H·d) -> (B, H, N, d)."""
    return x.reshape(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H·d)."""
    return x.transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """Projections around `attend`: queries (B, N, Q) over inputs (B, M, C) -> (B, N, Q)."""

    def __init__(
        self, config: AttentionConfig, num_query_channels: int, num_input_channels: int, masked_rows: MaskedRows
    ) -> None:
        super().__init__()
        self.num_heads, self.masked_rows = config.num_heads, masked_rows
        self.query = nn.Linear(num_query_channels, config.num_qk_channels)
        self.key = nn.Linear(num_input_channels, config.num_qk_channels)
        self.value = nn.Linear(num_input_channels, config.num_v_channels)
        self.output = nn.Linear(config.num_v_channels, num_query_channels)

    def forward(
        self,
        queries: Tensor,
        inputs: Tensor,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        input_norm: nn.Module | None = None,
    ) -> Tensor:
        def keys_and_values(rows: Tensor) -> tuple[Tensor, Tensor]:
            rows = rows if input_norm is None else input_norm(rows)
            return self.key(rows), self.value(rows)

        query = self.query(queries)
        keys, values = by_rows(keys_and_values, inputs)
        read = attend(query, keys, values, self.num_heads, mask, self.masked_rows)
        if query_mask is not None:
            read = read * query_mask.to(read.dtype)[:, :, None]
        output: Tensor = self.output(read)
        return output


class MLP(nn.Module):
    """Linear, activation, linear: (…, C) -> (…, C)."""

    def __init__(self, num_channels: int, widening_factor: int, activation: Activation) -> None:
        super().__init__()
        width = widening_factor * num_channels
        self.hidden = nn.Linear(num_channels, width)
        self.activation = Elementwise(activation)
        self.output = nn.Linear(width, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.output(self.activation(self.hidden(x)))
        return y


class CrossAttention(nn.Module):
    """Queries (B, N, Q) read inputs (B, M, C) -> (B, N, Q).

    ``mask`` (B, M) is 0 for inputs to ignore; queries where ``query_mask`` (B, N) is 0 read zeros.
    """

    def __init__(
        self,
        config: AttentionConfig,
        num_query_channels: int,
        num_input_channels: int,
        activation: Activation,
        masked_rows: MaskedRows = "mean",
    ) -> None:
        super().__init__()
        self.query_residual = config.query_residual
        self.query_norm = nn.LayerNorm(num_query_channels)
        self.input_norm = nn.LayerNorm(num_input_channels)
        self.attention = Attention(config, num_query_channels, num_input_channels, masked_rows)
        self.mlp_norm = nn.LayerNorm(num_query_channels)
        self.mlp = MLP(num_query_channels, config.widening_factor, activation)

    def forward(
        self, queries: Tensor, inputs: Tensor, mask: Tensor | None = None, query_mask: Tensor | None = None
    ) -> Tensor:
        x: Tensor = self.attention(self.query_norm(queries), inputs, mask, query_mask, self.input_norm)
        if self.query_residual:
            x = x + queries
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class SelfAttention(nn.Module):
    """Latents (B, N, D) read each other -> (B, N, D)."""

    def __init__(self, config: AttentionConfig, num_channels: int, activation: Activation) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_channels)
        self.attention = Attention(config, num_channels, num_channels, "mean")
        self.mlp_norm = nn.LayerNorm(num_channels)
        self.mlp = MLP(num_channels, config.widening_factor, activation)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.attention(normed, normed)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y
