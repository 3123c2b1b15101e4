# SPDX-License-Identifier: Apache-2.0
"""Each system of the papers, small, with random weights: `perceiver-export export tests.cli.small_models:points`."""

from __future__ import annotations

import torch

from perceiver_export.exporter import LoadedModel
from perceiver_export.exporter.model import architectures
from perceiver_export.exporter.model.architectures import (
    AudioVideoSizes,
    EncoderSizes,
    VideoSizes,
    first_perceiver,
    point_input,
)
from perceiver_export.exporter.model.config import AttentionConfig, PerceiverConfig, TokenInput
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.runtimes.preprocessing import (
    AudioPreprocessing,
    CenterCropShare,
    FlowPreprocessing,
    ImagePreprocessing,
    Normalize,
    PointsPreprocessing,
    Preprocessing,
    Rescale,
    Resize,
    TextPreprocessing,
    VideoPreprocessing,
)

ENCODER = EncoderSizes(6, 16, num_self_attentions_per_block=2, num_blocks=2, num_self_attention_heads=4)
TOKENS = TokenInput(262, 32, 24)
SOUND = AudioVideoSizes(480, 16, None, 2, 16, 16, (2, 8, 8), 4, 2)


def language() -> LoadedModel:
    decoder = AttentionConfig(4, 16, 24, query_residual=False)
    config = architectures.language_model(TOKENS, ENCODER, decoder, "deepmind")
    return loaded(config, "fill-mask", TextPreprocessing(32, special_tokens=False))


def sentiment() -> LoadedModel:
    config = architectures.classifier({"tokens": TOKENS}, ENCODER, 2, "deepmind")
    return loaded(config, "text-classification", TextPreprocessing(32, special_tokens=True), ("bad", "good"))


def glue() -> LoadedModel:
    config = architectures.multitask_text_classifier(TOKENS, ENCODER, {"cola": 2, "mnli": 3}, "deepmind")
    return loaded(config, "text-classification", TextPreprocessing(32, special_tokens=False))


def pictures() -> LoadedModel:
    image = architectures.image_input("conv", 24, 24, "deepmind", (6, 6))
    config = first_perceiver({"image": image}, ENCODER, 3, "deepmind", num_cross_attentions=2)
    crop, resize = CenterCropShare(0.875, 0.875, round_up=True), Resize(24, 24, "opencv-bicubic")
    values = Rescale(1 / 255), Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    steps = ImagePreprocessing(24, 24, (crop, resize, *values))
    return loaded(config, "image-classification", steps, ("cat", "dog", "bird"))


def flow() -> LoadedModel:
    config = architectures.optical_flow(16, 24, ENCODER, "deepmind")
    return loaded(config, "optical-flow", FlowPreprocessing(16, 24, min_overlap=4))


def video() -> LoadedModel:
    config = architectures.video_autoencoder(VideoSizes(2, 16, 16, 480, 5), ENCODER, "deepmind")
    return loaded(config, "video-autoencoding", VideoPreprocessing(2, 16, 16, 480, 48_000), split=True)


def sound() -> LoadedModel:
    inputs = SOUND.inputs("deepmind")
    config = architectures.classifier(inputs, ENCODER, 3, "deepmind", SOUND.num_input_channels)
    return loaded(config, "audio-classification", AudioPreprocessing(480, 48_000, 2, 16, 16), ("hum", "hiss", "bang"))


def mel() -> LoadedModel:
    inputs = {"mel": AudioVideoSizes(mel=(6, 8)).inputs("deepmind")["mel"]}
    config = architectures.classifier(inputs, ENCODER, 3, "deepmind")
    steps = AudioPreprocessing(4800, 48_000, mel=(6, 8))
    return loaded(config, "audio-classification", steps, ("hum", "hiss", "bang"))


def first_sound() -> LoadedModel:
    inputs, channels = SOUND.inputs("deepmind"), SOUND.num_input_channels
    config = first_perceiver(inputs, ENCODER, 3, "deepmind", 2, "none", "none", channels)
    return loaded(config, "audio-classification", AudioPreprocessing(480, 48_000, 2, 16, 16), ("hum", "hiss", "bang"))


def points() -> LoadedModel:
    config = first_perceiver({"points": point_input(20, 4, 10, "deepmind")}, ENCODER, 4, "deepmind", 2)
    return loaded(config, "point-cloud-classification", PointsPreprocessing(20), ("chair", "desk", "lamp", "sofa"))


def sets() -> LoadedModel:
    return loaded(architectures.set_transformer(12, 16, 8, ENCODER, "deepmind"), "sets", None)


def loaded(
    config: PerceiverConfig,
    task: str,
    preprocessing: Preprocessing | None,
    labels: tuple[str, ...] = (),
    split: bool = False,
) -> LoadedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PerceiverIO(config).eval()
    return LoadedModel(model, config, task, "deepmind", "small_models", labels, preprocessing, split)
