# SPDX-License-Identifier: Apache-2.0
"""Is the side to move checkmated, in check, or neither? A Perceiver IO that reads a set of pieces.

perceiver-export export examples.game.model:game -o game
"""

from __future__ import annotations

from pathlib import Path

import torch

from perceiver_export.exporter import LoadedModel
from perceiver_export.exporter.model import (
    ArrayInput,
    EncoderSizes,
    LearnedQueries,
    OutputConfig,
    PerceiverIO,
    own_model,
)

WEIGHTS = Path(__file__).with_name("game.pt")
LABELS = ("no check", "check", "checkmate")
MOST, CHANNELS = 32, 88  # as in positions.py


def untrained() -> PerceiverIO:
    """24 latents read a set of at most 32 pieces, and one query reads the latents."""
    pieces = ArrayInput((MOST,), CHANNELS, masked=True)
    scores = OutputConfig(LearnedQueries(1, 64), shape=(len(LABELS),), num_channels=len(LABELS))
    sizes = EncoderSizes(
        num_latents=24,
        num_latent_channels=64,
        num_self_attentions_per_block=3,
        num_cross_attention_heads=4,
        num_self_attention_heads=4,
        num_qk_channels=64,
        num_v_channels=64,
        self_attention_widening_factor=2,
    )
    return PerceiverIO(own_model({"pieces": pieces}, {"scores": scores}, sizes, num_decoder_heads=4))


def game() -> LoadedModel:
    """The trained classifier."""
    model = untrained()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return LoadedModel.own(model, labels=LABELS, output_kinds={"scores": "single-label"})
