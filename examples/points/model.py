# SPDX-License-Identifier: Apache-2.0
"""A Perceiver IO that classifies point clouds of furniture and other objects into ten kinds.

perceiver-export export examples.points.model:points -o points
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
from perceiver_export.runtimes.preprocessing import PointsPreprocessing

LABELS = ("bed", "cabinet", "car", "chair", "door or window", "lamp", "person", "plant", "sofa", "table")
POINTS = 512  # of a cloud
WEIGHTS = Path(__file__).parent / "checkpoint" / "model.safetensors"


def untrained() -> PerceiverIO:
    """16 latents of 96 channels read Fourier features of 512 points, then each other; one query reads the latents."""
    points = ArrayInput((POINTS,), 3, value_positions=FourierPositions(8, (16, 16, 16)))
    logits = OutputConfig(LearnedQueries(1, 96), shape=(len(LABELS),), num_channels=len(LABELS))
    sizes = EncoderSizes(16, 96, 3, num_cross_attention_heads=3, num_self_attention_heads=4)
    return PerceiverIO(own_model({"points": points}, {"logits": logits}, sizes))


def points() -> LoadedModel:
    """The trained model. It reads 512 points of a cloud, moved and scaled into a cube."""
    model = untrained()
    model.load_state_dict(load_file(WEIGHTS))
    steps = PointsPreprocessing(POINTS)
    return LoadedModel.own(model, "point-cloud-classification", labels=LABELS, preprocessing=steps)
