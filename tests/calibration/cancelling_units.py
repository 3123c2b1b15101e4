# SPDX-License-Identifier: Apache-2.0
"""A model with one layer that int8 ruins, for the search to find."""

from __future__ import annotations

from pathlib import Path

import torch

from perceiver_export.exporter import LoadedModel, load_model

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist" / "checkpoint"
LAYER = "encoder.self_attentions.0.1.mlp"
_SHIFT, _WEIGHT = 10.0, 300.0


def with_cancelling_units() -> LoadedModel:
    """The demo's model with three hidden units of `LAYER` that say much and together nothing.

    GELU(h) − GELU(−h) = h, and GELU(h + 10) = h + 10, so the third less the first two is 10, which the bias takes off
    again: in fp32 nothing is left of them. In int8 each is rounded by itself, and what is left is noise of the order
    of the activation's step times a large weight. The three units that matter least are taken.
    """
    loaded = load_model(CHECKPOINT)
    weights = {name: value.data for name, value in loaded.model.named_parameters() if name.startswith(LAYER)}
    hidden, shift = weights[f"{LAYER}.hidden.weight"], weights[f"{LAYER}.hidden.bias"]
    output, bias = weights[f"{LAYER}.output.weight"], weights[f"{LAYER}.output.bias"]
    first, second, third = (hidden.norm(dim=1) * output.norm(dim=0)).argsort()[:3].tolist()
    signs = _WEIGHT * (torch.arange(len(output)) % 2 * 2.0 - 1.0)
    hidden[second], shift[second] = -hidden[first], -shift[first]
    hidden[third], shift[third] = hidden[first], shift[first] + _SHIFT
    output[:, first], output[:, second], output[:, third] = -signs, signs, signs
    bias -= _SHIFT * signs
    return loaded
