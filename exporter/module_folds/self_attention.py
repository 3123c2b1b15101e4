# SPDX-License-Identifier: Apache-2.0
"""The latents' self-attention, some heads at a time: 16 heads over 2048 latents are 268 MB of scores at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perceiver_export.exporter.model.attention import SelfAttention, merge_heads, split_heads


class ChunkedSelfAttention(nn.Module):
    """Latents (B, N, D) -> (B, N, D), as `SelfAttention` gives; ``heads`` at a time, and of each ``rows`` queries."""

    def __init__(self, reference: SelfAttention, heads: int, rows: int) -> None:
        super().__init__()
        self.norm, self.attention = reference.norm, reference.attention
        self.mlp_norm, self.mlp = reference.mlp_norm, reference.mlp
        self.heads, self.rows = heads, rows

    def forward(self, x: Tensor) -> Tensor:
        normed, attention = self.norm(x), self.attention
        projections = (attention.query, attention.key, attention.value)
        q, k, v = (split_heads(project(normed), attention.num_heads) for project in projections)
        q = q / math.sqrt(q.shape[-1])
        reads = []
        for head in range(0, attention.num_heads, self.heads):
            some = slice(head, head + self.heads)
            reads.append(self._read(q[:, some], k[:, some].transpose(-1, -2), v[:, some]))
        x = x + attention.output(merge_heads(torch.cat(reads, dim=1) if len(reads) > 1 else reads[0]))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y

    def _read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts = range(0, q.shape[2], self.rows)
        reads = [torch.softmax(q[:, :, start : start + self.rows] @ k, dim=-1) @ v for start in starts]
        return torch.cat(reads, dim=2) if len(reads) > 1 else reads[0]
