# SPDX-License-Identifier: Apache-2.0
"""How data becomes the inputs of a preset. Needs no torch."""

from __future__ import annotations

import msgspec

from perceiver_export.exporter.checkpoints.preprocessor import image_preprocessing
from perceiver_export.exporter.perceiver.architectures import Parity
from perceiver_export.exporter.perceiver.audio_architectures import AudioVideoSizes
from perceiver_export.exporter.perceiver.config import (
    ArrayInput,
    FramePairInput,
    ImageInput,
    PerceiverConfig,
    TokenInput,
)
from perceiver_export.runtimes.preprocessing import (
    AudioPreprocessing,
    FlowPreprocessing,
    PointsPreprocessing,
    Preprocessing,
    TextPreprocessing,
    VideoPreprocessing,
)

SAMPLE_RATE = 48_000  # in both papers


def preset_preprocessing(task: str, config: PerceiverConfig, parity: Parity) -> Preprocessing | None:
    """The steps before a model of these sizes; None where it takes arrays as they are."""
    one = next(iter(config.inputs.values()))
    if isinstance(one, ImageInput):
        steps = image_preprocessing({}, one.height, one.width)
        return msgspec.structs.replace(steps, resample="opencv-bicubic") if parity == "deepmind" else steps
    if isinstance(one, FramePairInput):
        return FlowPreprocessing.of_tile(one.height, one.width)
    if isinstance(one, TokenInput) and task != "arrays":
        return TextPreprocessing(one.length, special_tokens=parity == "huggingface")
    if task == "point-cloud-classification" and isinstance(one, ArrayInput):
        return PointsPreprocessing(one.shape[0])
    frames = config.inputs.get("frames")
    return _sound_and_frames(task, one, frames) if isinstance(frames, ArrayInput) else None


def _sound_and_frames(task: str, sound: object, frames: ArrayInput) -> Preprocessing:
    assert isinstance(sound, ArrayInput)
    num_frames, height, width = frames.shape
    if task == "video-autoencoding":
        return VideoPreprocessing(num_frames, height, width, sound.shape[0], SAMPLE_RATE)
    if len(sound.shape) == 1:
        return AudioPreprocessing(sound.shape[0], SAMPLE_RATE, num_frames, height, width)
    mel = (sound.shape[0], sound.shape[1])  # made of as many samples as the other model hears
    return AudioPreprocessing(AudioVideoSizes.num_samples, SAMPLE_RATE, num_frames, height, width, mel)
