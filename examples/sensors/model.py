# SPDX-License-Identifier: Apache-2.0
"""A Perceiver IO that tells which of nine people spoke, from time series of 12 channels and up to 29 steps.

perceiver-export export examples.sensors.model:speaker -o sensors
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from perceiver_export.exporter import LoadedModel
from perceiver_export.exporter.model import (
    ArrayInput,
    EncoderSizes,
    FourierPositions,
    LearnedQueries,
    OutputConfig,
    PerceiverIO,
    own_model,
)

STEPS, CHANNELS, SPEAKERS = 29, 12, 9
WEIGHTS = Path(__file__).parent / "checkpoint" / "model.safetensors"


def untrained() -> PerceiverIO:
    """16 latents of 64 channels read the unmasked steps, then each other; one query reads the latents."""
    positions = FourierPositions(6, (STEPS,))
    series = ArrayInput((STEPS,), CHANNELS, (1,), num_projected_channels=51, positions=positions, masked=True)
    scores = OutputConfig(LearnedQueries(1, 64), shape=(SPEAKERS,), num_channels=SPEAKERS)
    sizes = EncoderSizes(16, 64, num_self_attentions_per_block=3, num_self_attention_heads=4)
    return PerceiverIO(own_model({"series": series}, {"scores": scores}, sizes))


def speaker() -> LoadedModel:
    """The trained model, with the names of its labels."""
    model = untrained()
    model.load_state_dict(load_file(WEIGHTS))
    labels = [f"speaker {number}" for number in range(1, SPEAKERS + 1)]
    return LoadedModel.own(model, labels=labels, output_kinds={"scores": "single-label"})
