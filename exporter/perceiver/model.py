# SPDX-License-Identifier: Apache-2.0
"""Perceiver IO, cut where export cuts it: input adapter -> encoder -> latents -> decoder -> outputs.

Source: Perceiver IO (arXiv 2107.14795), figure 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_export.exporter.perceiver.adapters import ImageAdapter
from perceiver_export.exporter.perceiver.attention import CrossAttention, SelfAttention
from perceiver_export.exporter.perceiver.config import Activation, DecoderConfig, EncoderConfig, PerceiverConfig


class PerceiverEncoder(nn.Module):
    """Inputs (B, M, C) -> latents (B, N, D). All blocks share the weights of one."""

    def __init__(self, config: EncoderConfig, num_input_channels: int, activation: Activation) -> None:
        super().__init__()
        num_channels = config.num_latent_channels
        self.num_blocks = config.num_blocks
        self.latents = nn.Parameter(torch.randn(config.num_latents, num_channels) * 0.02)
        cross_width = num_input_channels if config.cross_attention_width == "kv" else num_channels
        cross_qk = config.num_qk_channels or cross_width
        self_qk = config.num_qk_channels or num_channels
        self.cross_attention = CrossAttention(
            num_channels,
            num_input_channels,
            cross_qk,
            config.num_v_channels or cross_qk,
            config.num_cross_attention_heads,
            config.cross_attention_widening_factor,
            config.query_residual,
            activation,
        )
        self.self_attentions = nn.ModuleList(
            SelfAttention(
                num_channels,
                self_qk,
                config.num_v_channels or self_qk,
                config.num_self_attention_heads,
                config.self_attention_widening_factor,
                activation,
            )
            for _ in range(config.num_self_attentions_per_block)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        latents: Tensor = self.cross_attention(self.latents.unsqueeze(0), inputs)
        for _ in range(self.num_blocks):
            for layer in self.self_attentions:
                latents = layer(latents)
        return latents


class PerceiverDecoder(nn.Module):
    """Latents (B, N, D), read by learned queries (O × F) -> outputs (B, O, E)."""

    def __init__(self, config: DecoderConfig, num_latent_channels: int, activation: Activation) -> None:
        super().__init__()
        width = num_latent_channels if config.cross_attention_width == "kv" else config.num_query_channels
        self.queries = nn.Parameter(torch.randn(config.num_queries, config.num_query_channels) * 0.02)
        self.cross_attention = CrossAttention(
            config.num_query_channels,
            num_latent_channels,
            width,
            width,
            config.num_heads,
            config.widening_factor,
            config.query_residual,
            activation,
        )
        self.output = nn.Linear(config.num_query_channels, config.num_output_channels)

    def forward(self, latents: Tensor) -> Tensor:
        outputs: Tensor = self.output(self.cross_attention(self.queries.unsqueeze(0), latents))
        return outputs


class PerceiverIO(nn.Module):
    """Image classifier: pictures (B, channels, height, width) -> logits (B, labels)."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        self.input_adapter = ImageAdapter(config.input)
        self.encoder = PerceiverEncoder(config.encoder, config.input.num_input_channels, config.activation)
        self.decoder = PerceiverDecoder(config.decoder, config.encoder.num_latent_channels, config.activation)

    def forward(self, image: Tensor) -> Tensor:
        outputs: Tensor = self.decoder(self.encoder(self.input_adapter(image)))
        return outputs.squeeze(1)
