# SPDX-License-Identifier: Apache-2.0
"""A Perceiver IO of your own: any arrays in, any queries out.

    cd examples
    perceiver-export export your_own:robot -o robot
    perceiver-export run robot arrays.npz -o out.npz

A robot that hears, feels and knows where its joints are: what is near, and how its arm will move. Train the model that
`robot` gives with your own loop, and load its state dict before returning it.
"""

from __future__ import annotations

from perceiver_export.exporter.perceiver import (
    ArrayInput,
    EncoderSizes,
    FourierPositions,
    LearnedPositions,
    LearnedQueries,
    OutputConfig,
    PerceiverIO,
    PositionQueries,
    own_model,
)


def robot() -> PerceiverIO:
    """Three inputs of three ranks, read by 16 latents; two outputs."""
    inputs = {
        "sound": ArrayInput((160,), 1, patch=(8,), positions=FourierPositions(6, (160,))),
        "touch": ArrayInput((6, 8), 2, positions=FourierPositions(4, (6, 8))),
        "joints": ArrayInput((7,), 3, positions=LearnedPositions((7,), 12), masked=True),
    }
    outputs = {
        "objects": OutputConfig(LearnedQueries(5, 32), shape=(5, 10), num_channels=10),
        "motion": OutputConfig(PositionQueries((20,), FourierPositions(6, (20,))), shape=(20, 7), num_channels=7),
    }
    return PerceiverIO(own_model(inputs, outputs, EncoderSizes(16, 32, num_self_attentions_per_block=2)))
