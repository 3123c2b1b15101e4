# SPDX-License-Identifier: Apache-2.0
"""Our models beside the numbers that perceiver-io gave (tests/vectors_krasserm): shared by tests and benchmark."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from perceiver_export.exporter import load_model
from perceiver_export.exporter.loaded import LoadedModel

VECTORS = Path(__file__).resolve().parents[1] / "vectors_krasserm"
MODELS = sorted(path.parent.name for path in VECTORS.glob("*/config.json"))
_FLOW_SCALE_FACTOR = 20  # perceiver-io multiplies by it behind the model


def read_vectors(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict of a model, and its inputs and outputs."""
    with np.load(VECTORS / name / "arrays.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    state = {key.removeprefix("state/"): one.float() for key, one in arrays.items() if key.startswith("state/")}
    return state, {key: one for key, one in arrays.items() if not key.startswith("state/")}


def write_directory(name: str, directory: Path) -> Path:
    """The model as perceiver-io saves it: config.json and model.safetensors."""
    directory.mkdir(exist_ok=True)
    shutil.copy(VECTORS / name / "config.json", directory)
    save_file(read_vectors(name)[0], directory / "model.safetensors", {"format": "pt"})
    return directory


def outputs(name: str, loaded: LoadedModel, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What our model gives, and what perceiver-io gave in float64."""
    arrays = read_vectors(name)[1]
    ((own, _),) = loaded.config.inputs.items()
    inputs = arrays["inputs"]
    if own == "tokens":
        feeds = {own: inputs, "tokens_mask": arrays["mask"]}
    elif own == "frames":
        feeds = {own: (inputs / 255.0 * 2 - 1).permute(0, 1, 4, 2, 3).to(dtype)}
    elif loaded.task == "image-classification":
        feeds = {own: inputs.permute(0, 3, 1, 2).to(dtype)}
    else:
        feeds = {own: inputs.to(dtype)}
    with torch.no_grad():
        (found,) = loaded.model.to(dtype)(feeds).values()
    return found, arrays["logits"] * (_FLOW_SCALE_FACTOR if own == "frames" else 1)


def difference(name: str, dtype: torch.dtype) -> float:
    """Largest difference of our output from perceiver-io's, as a share of its scale."""
    with tempfile.TemporaryDirectory() as directory:
        loaded = load_model(f"krasserm:{write_directory(name, Path(directory))}")
    found, expected = outputs(name, loaded, dtype)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())
