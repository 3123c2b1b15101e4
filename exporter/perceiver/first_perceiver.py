# SPDX-License-Identifier: Apache-2.0
"""The first Perceiver (arXiv 2103.03206) as configs: inputs read more than once, the latents' mean as head."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from perceiver_export.exporter.perceiver.architectures import EncoderSizes, Parity, classifier, fourier
from perceiver_export.exporter.perceiver.config import ArrayInput, AverageDecoder, Input, PerceiverConfig, Sharing


def first_perceiver(
    inputs: Mapping[str, Input],
    encoder: EncoderSizes,
    num_labels: int,
    parity: Parity,
    num_cross_attentions: int,
    cross_attention_sharing: Sharing = "all-but-first",
    block_sharing: Sharing = "all",
    num_input_channels: int = 0,
) -> PerceiverConfig:
    """Any inputs -> classes. The inputs are read before each of the first ``num_cross_attentions`` blocks.

    Sharing is by default that of the paper's ImageNet model: all cross-attentions but the first are one, all blocks
    are one (its appendix C). The latents are averaged, then projected, without a norm.
    """
    config = classifier(inputs, encoder, num_labels, parity, num_input_channels)
    repeated = msgspec.structs.replace(
        config.encoder,
        num_cross_attentions=num_cross_attentions,
        cross_attention_sharing=cross_attention_sharing,
        block_sharing=block_sharing,
    )
    return msgspec.structs.replace(config, encoder=repeated, decoder=AverageDecoder(num_labels))


def point_input(num_points: int, num_bands: int, max_frequency: int, parity: Parity) -> ArrayInput:
    """Points (x, y, z) with a mask: the Fourier features of where they are. Frequencies run up to ``max_frequency``."""
    positions = fourier(num_bands, (2 * max_frequency,) * 3, parity)  # a resolution is twice its highest frequency
    return ArrayInput((num_points,), 3, value_positions=positions, masked=True)
