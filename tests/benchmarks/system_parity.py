# SPDX-License-Identifier: Apache-2.0
"""The README's figures for systems that nobody published code of: graphs against torch, and the first Perceiver.

python tests/benchmarks/system_parity.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from perceiver_export.exporter import LoadedModel, export, load_model
from perceiver_export.exporter.perceiver.architectures import image_classifier, image_input
from tests.cli import small_models
from tests.exporter import krasserm_reference
from tests.exporter.lucidrains_reference import difference
from tests.exporter.test_first_perceiver import REPEATED, by_hand
from tests.exporter.test_lucidrains import CASES, variant

DTYPES = (torch.float32, torch.float64)
SYSTEMS = (
    *("language", "sentiment", "glue", "flow", "video", "sound", "mel", "sets"),
    *("pictures", "first_sound", "points"),  # the first Perceiver
)


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


def graph_against_torch(model: LoadedModel) -> float:
    """Largest difference of ONNX Runtime's outputs from torch's, as a share of the scale, whole and split."""
    with tempfile.TemporaryDirectory() as folder:
        bundles = [export(model, Path(folder) / str(split), split=split) for split in (False, True)]
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


def main() -> None:
    print("| system | graph against torch, float32 |\n|---|---|")
    for name, model in systems().items():
        print(f"| {name} | {graph_against_torch(model):.1e} |", flush=True)
    print(f"\nrepeated cross-attention against a loop by hand, float64: {loop_by_hand():.1e}")
    for kind in ("Perceiver", "PerceiverIO"):
        names = [name for model, name in CASES if model == kind]
        configs = [variant(kind, name, masked=masked) for name in names for masked in (False, True)]
        worst = [max(difference(config, dtype) for config in configs) for dtype in DTYPES]
        _print_worst(f"perceiver-pytorch's {kind}, {len(names)} variants", worst)
    models = krasserm_reference.MODELS
    worst = [max(krasserm_reference.difference(name, dtype) for name in models) for dtype in DTYPES]
    _print_worst(f"perceiver-io's {len(models)} models", worst)


def _print_worst(what: str, worst: list[float]) -> None:
    print(f"{what}: {worst[0]:.1e} in float32, {worst[1]:.1e} in float64", flush=True)


if __name__ == "__main__":
    main()
