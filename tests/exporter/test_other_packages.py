# SPDX-License-Identifier: Apache-2.0
"""perceiver-pytorch's own classes, exported as any module: their names, their masks, their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import perceiver_pytorch
import pytest
import torch
from torch import Tensor, nn

from perceiver_export.calibration import ValidateOptions, validate
from perceiver_export.exporter import ExportOptions, OwnModel, export
from tests.exporter.outputs import assert_bundle_gives

SIZES: dict[str, Any] = {
    "num_latents": 8,
    "latent_dim": 16,
    "cross_heads": 2,
    "latent_heads": 2,
    "cross_dim_head": 8,
    "latent_dim_head": 8,
    "depth": 1,
}
IMAGES = {"input_axis": 2, "input_channels": 3, "num_freq_bands": 3, "max_freq": 9.5, "num_classes": 7}
SETS = {"dim": 6, "queries_dim": 9, "logits_dim": 4}
# Without a mask, tied layers and the like: lucidrains_perceiver and lucidrains_perceiver_io of tests/zoo.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "masked image": ("Perceiver", IMAGES, {"data": (9, 7, 3), "mask": (9, 7)}),
    "tied": (
        "Perceiver",
        IMAGES | {"depth": 2, "weight_tie_layers": True, "self_per_cross_attn": 2},
        {"data": (9, 7, 3)},
    ),
    "three axes": ("Perceiver", IMAGES | {"input_axis": 3, "input_channels": 1}, {"data": (3, 5, 4, 1)}),
    "no positions": ("Perceiver", IMAGES | {"fourier_encode_data": False}, {"data": (9, 7, 3)}),
    "masked set": ("PerceiverIO", SETS, {"data": (11, 6), "mask": (11,), "queries": (5, 9)}),
    "decoder's MLP, no logits": (
        "PerceiverIO",
        SETS | {"decoder_ff": True, "logits_dim": None},
        {"data": (11, 6), "queries": (5, 9)},
    ),
}


def model_of(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    kind, arguments, shapes = CASES[name]
    torch.manual_seed(0)
    model = getattr(perceiver_pytorch, kind)(**SIZES | arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = {one: torch.randn(2, *shape) for one, shape in shapes.items()}
    if "mask" in inputs:
        inputs["mask"] = inputs["mask"] > -0.5
    return model.eval(), inputs


@pytest.mark.parametrize("name", CASES)
def test_the_bundle_is_the_packages_model(name: str, tmp_path: Path) -> None:
    model, inputs = model_of(name)
    if name == "masked image":
        inputs["mask"] = inputs["mask"].reshape(2, 9, 7)
    bundle = export(OwnModel(model, inputs, outputs=("out",)), tmp_path / "b", ExportOptions(batch="1:2:3"))
    three = {one: torch.cat([tensor, tensor[:1]]) for one, tensor in inputs.items()}
    with torch.no_grad():
        expected = {"out": model(**three).numpy()}
    assert_bundle_gives(bundle, {one: tensor.numpy() for one, tensor in three.items()}, expected)


def test_a_trained_module_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/tutorials/own_models.md says: its labels, and it is right about most images."""
    examples = Path(__file__).resolve().parents[2] / "examples"
    monkeypatch.chdir(examples)
    bundle = export("your_own:clothes", tmp_path / "b", ExportOptions(batch="1:1:64"))
    found = validate(bundle, examples / "fashion_mnist" / "test.npz", ValidateOptions(samples=1000))

    assert bundle.manifest.labels[8] == "Bag"
    assert bundle.manifest.parts["model"].folds[0].chosen == "folded"
    top1 = found.metric("top-1")
    assert top1 is not None
    assert top1.candidate.value > 75


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2] / "examples")
    bundle = export("other_packages:lucidrains", tmp_path / "b")

    (part,) = bundle.manifest.parts.values()
    assert [spec.name for spec in (*part.inputs, *part.outputs)] == ["data", "logits"]
    assert any(one.chosen == "folded" for one in part.folds)
