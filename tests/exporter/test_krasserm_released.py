# SPDX-License-Identifier: Apache-2.0
"""The configs of the released krasserm/perceiver-io-* give models of the right sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perceiver_export.exporter.checkpoints.krasserm_architecture import architecture
from perceiver_export.exporter.checkpoints.krasserm_config import read_krasserm
from perceiver_export.exporter.perceiver.model import PerceiverIO

RELEASED: dict[str, tuple[str, dict[str, Any], int]] = {
    "img-clf": (
        "image-classifier",
        {
            "encoder": {
                "image_shape": [224, 224, 3],
                "num_frequency_bands": 64,
                "num_cross_attention_heads": 1,
                "num_self_attention_layers_per_block": 6,
                "num_self_attention_blocks": 8,
            },
            "decoder": {"num_classes": 1000, "num_output_query_channels": 1024, "num_cross_attention_heads": 1},
            "num_latents": 512,
            "num_latent_channels": 1024,
        },
        48_440_627,
    ),
    "mlm": (
        "masked-language-model",
        {
            "encoder": {
                "vocab_size": 262,
                "max_seq_len": 2048,
                "num_input_channels": 768,
                "num_cross_attention_qk_channels": 256,
                "num_cross_attention_v_channels": 1280,
                "num_self_attention_qk_channels": 256,
                "num_self_attention_v_channels": 1280,
                "num_self_attention_layers_per_block": 26,
            },
            "decoder": {
                "vocab_size": 262,
                "max_seq_len": 2048,
                "num_cross_attention_qk_channels": 256,
                "num_cross_attention_v_channels": 768,
                "cross_attention_residual": False,
            },
            "num_latents": 256,
            "num_latent_channels": 1280,
        },
        201_108_230,
    ),
    "optical-flow": (
        "optical-flow",
        {
            "encoder": {
                "num_cross_attention_heads": 1,
                "num_self_attention_heads": 16,
                "num_self_attention_layers_per_block": 24,
            },
            "decoder": {
                "num_cross_attention_heads": 1,
                "num_cross_attention_qk_channels": 512,
                "num_cross_attention_v_channels": 512,
                "cross_attention_residual": False,
            },
            "num_latents": 2048,
            "num_latent_channels": 512,
        },
        41_057_134,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_models_are_as_large_as_deepminds(tmp_path: Path, name: str) -> None:
    """Their weights are those of DeepMind's models, converted: counted in transformers."""
    kind, sizes, parameters = RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": f"perceiver-io-{kind}", "model_config": sizes}))
    with torch.device("meta"):
        model = PerceiverIO(architecture(read_krasserm(tmp_path / "config.json")[1]))

    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
