# SPDX-License-Identifier: Apache-2.0
"""Attention and the two layers that a Perceiver is made of: cross-attention and self-attention, each with an MLP.

Source: Perceiver IO (arXiv 2107.14795), section 3.1 and appendix E. All layers are pre-norm; LayerNorm's epsilon is
1e-5 in DeepMind's code and in transformers, whatever a config says.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perceiver_export.exporter.perceiver.config import Activation


def attend(queries: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention, softmax(QKᵀ/√d)V: (B, N, E), (B, M, E), (B, M, V) -> (B, N, V).

    The batch of ``queries`` may be 1 where that of keys and values is larger (latents, learned queries).
    """
    q, k, v = (split_heads(x, num_heads) for x in (queries, keys, values))
    # Queries are scaled, not scores: N × d numbers instead of N × M, and none at all where queries are constant.
    scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(-1, -2))
    return merge_heads(torch.matmul(torch.softmax(scores, dim=-1), v))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H·d) -> (B, H, N, d)."""
    return x.reshape(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H·d)."""
    return x.transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """Projections round `attend`: queries (B, N, Q) over inputs (B, M, C) -> (B, N, Q)."""

    def __init__(
        self,
        num_query_channels: int,
        num_input_channels: int,
        num_qk_channels: int,
        num_v_channels: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(num_query_channels, num_qk_channels)
        self.key = nn.Linear(num_input_channels, num_qk_channels)
        self.value = nn.Linear(num_input_channels, num_v_channels)
        self.output = nn.Linear(num_v_channels, num_query_channels)

    def forward(self, queries: Tensor, inputs: Tensor) -> Tensor:
        context: Tensor = self.output(attend(self.query(queries), self.key(inputs), self.value(inputs), self.num_heads))
        return context


class MLP(nn.Module):
    """Linear, GELU, linear: (…, C) -> (…, C). DeepMind's GELU is the tanh approximation, transformers' is exact."""

    def __init__(self, num_channels: int, widening_factor: int, activation: Activation) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_channels, widening_factor * num_channels)
        self.activation = nn.GELU(approximate="tanh" if activation == "gelu-tanh" else "none")
        self.output = nn.Linear(widening_factor * num_channels, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.output(self.activation(self.hidden(x)))
        return y


class CrossAttention(nn.Module):
    """Queries (B, N, Q) read inputs (B, M, C) -> (B, N, Q).

    ``query_residual`` adds the queries to what they read; it is off where queries are positions and outputs are not.
    """

    def __init__(
        self,
        num_query_channels: int,
        num_input_channels: int,
        num_qk_channels: int,
        num_v_channels: int,
        num_heads: int,
        widening_factor: int,
        query_residual: bool,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.query_residual = query_residual
        self.query_norm = nn.LayerNorm(num_query_channels)
        self.input_norm = nn.LayerNorm(num_input_channels)
        self.attention = Attention(num_query_channels, num_input_channels, num_qk_channels, num_v_channels, num_heads)
        self.mlp_norm = nn.LayerNorm(num_query_channels)
        self.mlp = MLP(num_query_channels, widening_factor, activation)

    def forward(self, queries: Tensor, inputs: Tensor) -> Tensor:
        x: Tensor = self.attention(self.query_norm(queries), self.input_norm(inputs))
        if self.query_residual:
            x = x + queries
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class SelfAttention(nn.Module):
    """Latents (B, N, D) read each other -> (B, N, D)."""

    def __init__(
        self,
        num_channels: int,
        num_qk_channels: int,
        num_v_channels: int,
        num_heads: int,
        widening_factor: int,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_channels)
        self.attention = Attention(num_channels, num_channels, num_qk_channels, num_v_channels, num_heads)
        self.mlp_norm = nn.LayerNorm(num_channels)
        self.mlp = MLP(num_channels, widening_factor, activation)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.attention(normed, normed)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y
