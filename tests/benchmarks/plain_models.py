# SPDX-License-Identifier: Apache-2.0
"""transformers' models at the released sizes, with random weights: the peers that exports are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t

from tests.exporter.transformers_reference import patches

_IMAGENET: dict[str, Any] = {"d_latents": 1024, "num_latents": 512, "num_self_attends_per_block": 6, "num_blocks": 8}
_ONE_HEAD: dict[str, Any] = {"num_cross_attention_heads": 1, "num_labels": 1000}


def transformers_model(preset: str) -> Any | None:
    """transformers' model of that size in evaluation mode; None if it has none."""
    torch.manual_seed(0)
    model: Any
    if preset == "imagenet-fourier":
        model = t.PerceiverForImageClassificationFourier(t.PerceiverConfig(d_model=261, **_IMAGENET, **_ONE_HEAD))
    elif preset == "imagenet-learned":
        model = t.PerceiverForImageClassificationLearned(
            t.PerceiverConfig(d_model=512, image_size=224, **_IMAGENET, **_ONE_HEAD)
        )
    elif preset == "imagenet-conv":
        model = t.PerceiverForImageClassificationConvProcessing(
            t.PerceiverConfig(d_model=322, **_IMAGENET, **_ONE_HEAD)
        )
    elif preset == "language-bytes":
        model = t.PerceiverForMaskedLM(t.PerceiverConfig(qk_channels=256, v_channels=1280))
    elif preset == "optical-flow":
        sizes: dict[str, Any] = {
            "d_model": 322,
            "d_latents": 512,
            "num_latents": 2048,
            "num_self_attends_per_block": 24,
        }
        sizes |= {"num_self_attention_heads": 16, "num_cross_attention_heads": 1, "train_size": [368, 496]}
        model = t.PerceiverForOpticalFlow(t.PerceiverConfig(**sizes, num_blocks=1))
    else:
        return None
    return model.eval()


def plain_feeds(preset: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs of our graph, converted for the graph of `plain_export`."""
    if preset == "optical-flow":
        return {"inputs": patches(torch.from_numpy(feeds["frames"])).numpy()}
    if preset == "language-bytes":
        return {"inputs": feeds["tokens"].astype(np.int64), "mask": feeds["tokens_mask"].astype(np.float32)}
    return {"inputs": feeds["image"]} if "image" in feeds else feeds


def plain_scale(preset: str) -> float:
    """transformers leaves the last factor of optical flow to the caller."""
    return 20.0 if preset == "optical-flow" else 1.0


class Plain(torch.nn.Module):
    """transformers' model with positional inputs and its logits as the only output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        names = ("inputs", "attention_mask")
        logits: torch.Tensor = self.model(**dict(zip(names, inputs, strict=False))).logits
        return logits


def plain_module(checkpoint: str) -> torch.nn.Module:
    """The model that transformers saved there."""
    name = (t.PerceiverConfig.from_pretrained(checkpoint).architectures or [""])[0]
    return Plain(getattr(t, name).from_pretrained(checkpoint)).eval()


def plain_export(preset: str, model: Any, feeds: dict[str, np.ndarray], path: Path) -> None:
    """Export transformers' model with `torch.onnx.export`, as it is."""
    given = plain_feeds(preset, feeds)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        torch.onnx.export(
            Plain(model).eval(),
            tuple(map(torch.from_numpy, given.values())),
            path,
            dynamo=True,
            input_names=list(given),
            external_data=True,
            opset_version=20,
        )


def zoo_export(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], path: Path) -> None:
    """Export a module of the zoo with `torch.onnx.export`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        torch.onnx.export(
            module, (), path, kwargs=dict(inputs), dynamo=True, input_names=list(inputs), external_data=True,
            opset_version=20,
        )  # fmt: skip
