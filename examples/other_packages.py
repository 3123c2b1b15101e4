# SPDX-License-Identifier: Apache-2.0
"""Models of lucidrains/perceiver-pytorch and krasserm/perceiver-io, built by the packages' own classes.

    pip install perceiver-pytorch
    cd examples
    perceiver-export export other_packages:lucidrains -o bundle

Pass the arguments that the model was trained with, load its state dict, and return it with example inputs. The models
of any other package work in the same way. perceiver-io 0.11 needs Python 3.10 or older.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from perceiver_export.exporter import OwnModel

LUCIDRAINS, KRASSERM = Path("lucidrains.pt"), "krasserm/perceiver-io-img-clf-mnist"


def lucidrains() -> OwnModel:
    """An image classifier: images (B, H, W, C) -> logits (B, 10). Random weights without lucidrains.pt."""
    from perceiver_pytorch import Perceiver

    model = Perceiver(
        input_channels=3, input_axis=2, num_freq_bands=6, max_freq=10.0, depth=2, num_latents=32, latent_dim=64,
        cross_heads=1, latent_heads=4, cross_dim_head=32, latent_dim_head=16, num_classes=10, weight_tie_layers=True,
    )  # fmt: skip
    if LUCIDRAINS.exists():
        model.load_state_dict(torch.load(LUCIDRAINS, weights_only=True))
    return OwnModel(
        model, {"data": torch.rand(1, 48, 48, 3)}, outputs=("logits",), output_kinds={"logits": "single-label"}
    )


class ImageClassifier(nn.Module):
    """perceiver-io's classifier from the hub, which names its input differently and returns a mapping of results."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        found: Mapping[str, Tensor] = self.model(pixel_values=images)
        return found["logits"]


def krasserm() -> OwnModel:
    """Images (B, C, H, W) -> logits (B, 10)."""
    from perceiver.model.vision.image_classifier.huggingface import PerceiverImageClassifier

    model = PerceiverImageClassifier.from_pretrained(KRASSERM)
    images = torch.rand(1, 1, 28, 28)
    return OwnModel(ImageClassifier(model), (images,), outputs=("logits",), output_kinds={"logits": "single-label"})
