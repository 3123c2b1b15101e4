# SPDX-License-Identifier: Apache-2.0
"""The architectures of the papers at their full sizes, for sizing a device before there is a checkpoint."""

from __future__ import annotations

from perceiver_export.exporter.perceiver.config import (
    DecoderConfig,
    EncoderConfig,
    FourierPositions,
    ImageInput,
    LearnedPositions,
    PerceiverConfig,
)

# Perceiver IO (arXiv 2107.14795), table 7, configuration A: 512 latents of 1024 channels, 8 times the same 6 layers.
_IMAGENET_ENCODER = EncoderConfig(
    num_latents=512,
    num_latent_channels=1024,
    num_blocks=8,
    num_self_attentions_per_block=6,
    num_cross_attention_heads=1,
    num_self_attention_heads=8,
)
_IMAGENET_DECODER = DecoderConfig(num_queries=1, num_query_channels=1024, num_output_channels=1000)


def _imagenet(image: ImageInput) -> PerceiverConfig:
    return PerceiverConfig(input=image, encoder=_IMAGENET_ENCODER, decoder=_IMAGENET_DECODER)


PRESETS: dict[str, PerceiverConfig] = {
    "imagenet-learned": _imagenet(ImageInput(3, 224, 224, "conv1x1", 256, LearnedPositions((224, 224), 256, 256))),
    "imagenet-fourier": _imagenet(ImageInput(3, 224, 224, "pixels", 3, FourierPositions(64, (224, 224), "float32"))),
    "imagenet-conv": _imagenet(ImageInput(3, 224, 224, "conv", 64, FourierPositions(64, (56, 56), "float32"))),
}
