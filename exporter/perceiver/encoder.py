# SPDX-License-Identifier: Apache-2.0
"""The encoder: latents read the inputs, then each other.

Source: Perceiver IO (arXiv 2107.14795), section 3.1; Perceiver (arXiv 2103.03206), section 3.1, where the inputs are
read more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perceiver_export.exporter.perceiver.attention import CrossAttention, SelfAttention
from perceiver_export.exporter.perceiver.config import Activation, EncoderConfig, Sharing


class PerceiverEncoder(nn.Module):
    """Inputs (B, M, C), and which of them are there (B, M) -> latents (B, N, D)."""

    def __init__(
        self,
        config: EncoderConfig,
        num_input_channels: int,
        activation: Activation,
        masked_rows: Literal["zero", "mean"] = "mean",
    ) -> None:
        super().__init__()
        self.config = config
        num_channels = config.num_latent_channels
        self.latents = nn.Parameter(torch.randn(config.num_latents, num_channels) * 0.02)
        self.cross_attentions = nn.ModuleList(
            CrossAttention(config.cross_attention, num_channels, num_input_channels, activation, masked_rows)
            for _ in range(_distinct(config.num_cross_attentions, config.cross_attention_sharing))
        )
        self.self_attentions = nn.ModuleList(
            nn.ModuleList(
                SelfAttention(config.self_attention, num_channels, activation)
                for _ in range(config.num_self_attentions_per_block)
            )
            for _ in range(_distinct(config.num_blocks, config.block_sharing))
        )

    def forward(self, inputs: Tensor | Sequence[Tensor | None], mask: Tensor | None = None) -> Tensor:
        latents = self.latents.unsqueeze(0)
        for index in range(self.config.num_blocks):
            if index < self.config.num_cross_attentions:
                read = self.cross_attentions[layer_index(index, self.config.cross_attention_sharing)]
                latents = read(latents, inputs, mask)
            block = self.self_attentions[layer_index(index, self.config.block_sharing)]
            assert isinstance(block, nn.ModuleList)
            for layer in block:
                latents = layer(latents)
        return latents


def _distinct(count: int, sharing: Sharing) -> int:
    """How many sets of weights ``count`` layers have."""
    return {"all": 1, "all-but-first": min(count, 2), "none": count}[sharing]


def layer_index(index: int, sharing: Sharing) -> int:
    """Which set of weights the layer ``index`` uses."""
    return {"all": 0, "all-but-first": min(index, 1), "none": index}[sharing]
