# SPDX-License-Identifier: Apache-2.0
"""The systems of both papers at their trained sizes, as functions of the parity.

"Perceiver IO" is arXiv 2107.14795v3, "Perceiver" arXiv 2103.03206v2. `exporter.presets` names each size that a paper
leaves open.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from perceiver_export.exporter.model.architectures import (
    AudioVideoSizes,
    EncoderSizes,
    Parity,
    VideoSizes,
    audio_video_classifier,
    first_perceiver,
    image_classifier,
    image_input,
    language_model,
    multitask_text_classifier,
    optical_flow,
    point_input,
    set_transformer,
    text_classifier,
    video_autoencoder,
)
from perceiver_export.exporter.model.config import (
    AttentionConfig,
    PerceiverConfig,
    Sharing,
    TokenInput,
)

BYTES, SENTENCEPIECE = 262, 32_000  # tokens of the vocabularies
IMAGENET_CLASSES, KINETICS_CLASSES, AUDIOSET_CLASSES, MODELNET_CLASSES = 1000, 700, 527, 40
GLUE_CLASSES = {"cola": 2, "mnli": 3, "mrpc": 2, "qnli": 2, "qqp": 2, "rte": 2, "sst2": 2, "stsb": 1}
MEL = (75, 64)  # frames, bins: only their product, 4800, is published

# Perceiver IO, section A: configuration A shares 6 layers 8 times, B has 16 with MLPs four times as wide.
CONFIG_A = EncoderSizes(512, 1024, num_self_attentions_per_block=6, num_blocks=8)
CONFIG_B = EncoderSizes(512, 1024, num_self_attentions_per_block=16, self_attention_widening_factor=4)


def _text_encoder(num_channels: int, num_layers: int) -> EncoderSizes:
    return EncoderSizes(256, num_channels, num_layers, 1, 8, 8, num_qk_channels=256, num_v_channels=num_channels)


def language(vocabulary_size: int, length: int, num_channels: int, num_layers: int, parity: Parity) -> PerceiverConfig:
    """Masked language models: Perceiver IO, table 11; widths of the attention from DeepMind's code."""
    tokens = TokenInput(vocabulary_size, length, 768)
    decoder = AttentionConfig(8, 256, 768, query_residual=False)
    return language_model(tokens, _text_encoder(num_channels, num_layers), decoder, parity)


_BYTES_768 = TokenInput(BYTES, 2048, 768)
# The byte model with one query for one task, and with a query and a head for each: Perceiver IO, sections F.4 and 4.1.
sentence_classifier = partial(text_classifier, _BYTES_768, _text_encoder(1280, 26), 2)
glue = partial(multitask_text_classifier, _BYTES_768, _text_encoder(1280, 26), GLUE_CLASSES)
# The released model of optical flow.
flow = partial(optical_flow, 368, 496, EncoderSizes(2048, 512, 24, num_self_attention_heads=16))
# The entity encoder of AlphaStar: Perceiver IO, section B and table 5.
starcraft = partial(set_transformer, 512, 256, 128, EncoderSizes(32, 512, 3))


def imagenet(
    features: Literal["pixels", "conv1x1", "conv"], grid: int, encoder: EncoderSizes, parity: Parity
) -> PerceiverConfig:
    """Perceiver IO, table 7."""
    image = image_input(features, 224, 224, parity, (grid, grid))
    return image_classifier(image, encoder, IMAGENET_CLASSES, parity)


def video(num_latents: int, parity: Parity) -> PerceiverConfig:
    """The released video autoencoder, with 784, 392 or 196 latents: Perceiver IO, section 4.3."""
    return video_autoencoder(VideoSizes(num_labels=KINETICS_CLASSES), EncoderSizes(num_latents, 512, 8), parity)


def audioset(mel: tuple[int, int] | None, num_channels: int, parity: Parity) -> PerceiverConfig:
    """Perceiver IO, section C and tables 6 and 10."""
    encoder = EncoderSizes(512, num_channels, 12)
    return audio_video_classifier(AudioVideoSizes(mel=mel), encoder, AUDIOSET_CLASSES, parity, num_query_channels=1024)


def first_imagenet(
    num_cross_attentions: int, cross_attention_sharing: Sharing, block_sharing: Sharing, parity: Parity
) -> PerceiverConfig:
    """Perceiver, sections 4.1, B and C."""
    image = image_input("pixels", 224, 224, parity, (224, 224))
    return first_perceiver(
        {"image": image},
        CONFIG_A,
        IMAGENET_CLASSES,
        parity,
        num_cross_attentions,
        cross_attention_sharing,
        block_sharing,
    )


def first_audioset(encoder: EncoderSizes, parity: Parity) -> PerceiverConfig:
    """Raw audio and video, read before every block, no weights shared: Perceiver, section 4.2."""
    sizes = AudioVideoSizes()
    return first_perceiver(
        sizes.inputs(parity),
        encoder,
        AUDIOSET_CLASSES,
        parity,
        num_cross_attentions=encoder.num_blocks,
        cross_attention_sharing="none",
        block_sharing="none",
        num_input_channels=sizes.num_input_channels,
    )


def modelnet(parity: Parity) -> PerceiverConfig:
    """Perceiver, section 4.3: read twice, otherwise as for ImageNet."""
    points = point_input(2048, num_bands=64, max_frequency=1120, parity=parity)
    encoder = EncoderSizes(512, 1024, num_self_attentions_per_block=6, num_blocks=2)
    return first_perceiver({"points": points}, encoder, MODELNET_CLASSES, parity, num_cross_attentions=2)


# Of each system in presets.json.
BUILDERS: dict[str, Callable[[Parity], PerceiverConfig]] = {
    "language-bytes": partial(language, BYTES, 2048, 1280, 26),
    "language-bytes-plus-plus": partial(language, BYTES, 2048, 1536, 40),
    "language-sentencepiece": partial(language, SENTENCEPIECE, 512, 1280, 26),
    "language-classification": sentence_classifier,
    "language-multitask": glue,
    "imagenet-learned": partial(imagenet, "conv1x1", 224, CONFIG_A),
    "imagenet-fourier": partial(imagenet, "pixels", 224, CONFIG_A),
    "imagenet-conv": partial(imagenet, "conv", 56, CONFIG_A),
    "imagenet-fourier-b": partial(imagenet, "pixels", 224, CONFIG_B),
    "imagenet-conv-b": partial(imagenet, "conv", 56, CONFIG_B),
    "optical-flow": flow,
    "video-autoencoding": partial(video, 784),
    "video-autoencoding-176x": partial(video, 392),
    "video-autoencoding-352x": partial(video, 196),
    "audioset-raw": partial(audioset, None, 512),
    "audioset-mel": partial(audioset, MEL, 1024),
    "starcraft": starcraft,
    "perceiver-imagenet": partial(first_imagenet, 8, "all-but-first", "all"),
    "perceiver-imagenet-1x": partial(first_imagenet, 1, "all-but-first", "all"),
    "perceiver-imagenet-unshared": partial(first_imagenet, 8, "none", "none"),
    "perceiver-audioset": partial(first_audioset, EncoderSizes(512, 512, 12)),
    "perceiver-audioset-2x": partial(first_audioset, EncoderSizes(512, 1024, 8, 2)),
    "modelnet40": modelnet,
}
