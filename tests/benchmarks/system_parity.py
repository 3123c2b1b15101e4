# SPDX-License-Identifier: Apache-2.0
"""Figures of docs/results/parity.md for systems without published code: graphs against torch, and the first Perceiver.

python -m tests.benchmarks.system_parity
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from perceiver_export.exporter import ExportOptions, LoadedModel, export, load_model
from perceiver_export.exporter.model.architectures import image_classifier, image_input
from tests.benchmarks.harness import Row, command
from tests.cli import small_models
from tests.exporter.test_first_perceiver import REPEATED, by_hand

SYSTEMS = (
    *("language", "sentiment", "glue", "flow", "video", "sound", "mel", "sets"),
    *("pictures", "first_sound", "points"),  # the first Perceiver
)


def measure(work: Path) -> Iterator[Row]:
    for name, model in systems().items():
        yield {"system": name, "graph against torch, float32": graph_against_torch(model, work / name)}
    yield {"by hand": "repeated cross-attention", "float64": loop_by_hand()}


def systems() -> dict[str, LoadedModel]:
    """Each system, small, with random weights."""
    models = {name: getattr(small_models, name)() for name in SYSTEMS}
    kinds: tuple[Literal["conv1x1", "pixels", "conv"], ...] = ("conv1x1", "pixels", "conv")
    for features in kinds:
        image = image_input(features, 24, 24, "deepmind", (24, 24))
        config = image_classifier(image, small_models.ENCODER, 3, "deepmind")
        models[f"ImageNet, {features}"] = small_models.loaded(config, "arrays", None)
    models["your own"] = load_model("examples.your_own:robot")
    return models


def graph_against_torch(model: LoadedModel, folder: Path) -> float:
    """Largest difference of ONNX Runtime's outputs from torch's, as a share of the scale, whole and split."""
    bundles = [export(model, folder / str(split), ExportOptions(split=split)) for split in (False, True)]
    return max(check.difference for bundle in bundles for check in bundle.manifest.verification)


def loop_by_hand() -> float:
    """Largest difference, in float64, of the repeated cross-attention from a loop over samples, heads and blocks."""
    torch.set_default_dtype(torch.float64)
    worst = 0.0
    for repeated in REPEATED:
        model, inputs = repeated.build(), torch.randn(2, 9, 7)
        found = model({"points": inputs})["logits"]
        for row, sample in zip(found, inputs, strict=True):
            expected = by_hand(model, sample, repeated.reads, repeated.blocks)
            worst = max(worst, float((row - expected).abs().max() / expected.abs().max()))
    torch.set_default_dtype(torch.float32)
    return worst


if __name__ == "__main__":
    command(measure)
