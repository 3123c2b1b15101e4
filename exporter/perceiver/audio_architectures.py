# SPDX-License-Identifier: Apache-2.0
"""Classifiers of sound and video as configs: the AudioSet models of both papers."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from perceiver_export.exporter.perceiver.architectures import EncoderSizes, Parity, classifier, fourier
from perceiver_export.exporter.perceiver.config import (
    ArrayInput,
    Input,
    LearnedQueries,
    OutputConfig,
    PerceiverConfig,
    QueryDecoder,
)

MODALITY_CHANNELS = 4  # trained channels beside the widest modality; the others are padded to as many in all


@dataclass(frozen=True)
class AudioVideoSizes:
    """1.28 seconds: 61,440 samples in patches of 128, and 32 frames in patches of 2 × 8 × 8.

    With ``mel`` (frames, bins) the model hears a spectrogram, each value of which is an input. 16 bands a video axis
    are what 487 channels leave beside 384 values of a patch and 4 of the modality.
    """

    num_samples: int = 61_440
    samples_per_patch: int = 128
    mel: tuple[int, int] | None = None
    num_frames: int = 32
    height: int = 224
    width: int = 224
    video_patch: tuple[int, int, int] = (2, 8, 8)
    audio_bands: int = 64
    video_bands: int = 16

    def inputs(self, parity: Parity) -> dict[str, Input]:
        """Sound and frames, each beside the Fourier features of its patch's place, up to the grid's Nyquist."""
        if self.mel is not None:
            sound = ArrayInput(self.mel, 1, positions=fourier(self.audio_bands, self.mel, parity))
        else:
            grid = (self.num_samples // self.samples_per_patch,)
            positions = fourier(self.audio_bands, grid, parity)
            sound = ArrayInput((self.num_samples,), 1, (self.samples_per_patch,), positions=positions)
        shape = (self.num_frames, self.height, self.width)
        places = tuple(size // step for size, step in zip(shape, self.video_patch, strict=True))
        frames = ArrayInput(shape, 3, self.video_patch, positions=fourier(self.video_bands, places, parity))
        return {"mel" if self.mel is not None else "audio": sound, "frames": frames}

    @property
    def num_input_channels(self) -> int:
        """Channels of every input, once padded."""
        widest = max(one.num_input_channels for one in self.inputs("deepmind").values())
        return widest + MODALITY_CHANNELS


def audio_video_classifier(
    sizes: AudioVideoSizes, encoder: EncoderSizes, num_labels: int, parity: Parity, num_query_channels: int
) -> PerceiverConfig:
    """Sound and frames -> classes, read by one learned query of ``num_query_channels`` (Perceiver IO, table 6)."""
    config = classifier(sizes.inputs(parity), encoder, num_labels, parity, sizes.num_input_channels)
    outputs = {"logits": OutputConfig(LearnedQueries(1, num_query_channels), (num_labels,))}
    attention = encoder.decoder_attention(num_query_channels, query_residual=True)
    decoder = QueryDecoder(outputs, num_query_channels, attention, num_labels)
    return msgspec.structs.replace(config, decoder=decoder)
