# SPDX-License-Identifier: Apache-2.0
"""A Perceiver IO that tells which of five languages one second of speech is in.

perceiver-export export examples.speech.model:speech -o speech
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from perceiver_export.exporter import LoadedModel
from perceiver_export.exporter.model import (
    ArrayInput,
    EncoderSizes,
    LearnedPositions,
    LearnedQueries,
    OutputConfig,
    PerceiverIO,
    own_model,
)
from perceiver_export.runtimes.preprocessing import AudioPreprocessing

LABELS = ("English", "Spanish", "French", "Italian", "Russian")
RATE = WINDOW = 8000  # samples per second, and samples that the model hears
FRAMES, BINS = 40, 20  # of the log-mel spectrogram
PATCH = (2, BINS)
WEIGHTS = Path(__file__).parent / "checkpoint" / "model.safetensors"


def untrained() -> PerceiverIO:
    """16 latents of 96 channels read 20 patches of two frames, then each other; one query reads the latents."""
    positions = LearnedPositions((FRAMES // PATCH[0], 1), 32)
    mel = ArrayInput((FRAMES, BINS), 1, PATCH, num_projected_channels=64, positions=positions)
    logits = OutputConfig(LearnedQueries(1, 96), shape=(len(LABELS),), num_channels=len(LABELS))
    sizes = EncoderSizes(16, 96, 3, num_cross_attention_heads=4, num_self_attention_heads=4)
    return PerceiverIO(own_model({"mel": mel}, {"logits": logits}, sizes))


def speech() -> LoadedModel:
    """The trained model, which hears a second of sound at 8 kHz as a spectrogram."""
    model = untrained()
    model.load_state_dict(load_file(WEIGHTS))
    return LoadedModel.own(
        model,
        "audio-classification",
        labels=LABELS,
        preprocessing=AudioPreprocessing(WINDOW, RATE, mel=(FRAMES, BINS)),
        output_kinds={"logits": "single-label"},
    )
