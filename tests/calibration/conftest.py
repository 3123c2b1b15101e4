# SPDX-License-Identifier: Apache-2.0
"""Bundles of the demo's model that tests of calibration share; read them, do not change them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from perceiver_export.calibration.pipeline import quantize
from perceiver_export.exporter import export, load_model

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"


@pytest.fixture(scope="session")
def int8_bundle(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model in int8, calibrated on 32 pictures that were held out of training."""
    path = tmp_path_factory.mktemp("int8") / "fashion-int8"
    return quantize(fashion_bundle, FASHION / "held_out.npz", path, samples=32).path


@pytest.fixture(scope="session")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with one layer's weights times 40."""
    loaded = load_model(FASHION / "checkpoint")
    dict(loaded.model.named_parameters())["encoder.self_attentions.0.0.mlp.output.weight"].data.mul_(40)
    return export(loaded, tmp_path_factory.mktemp("bundles") / "ruined").path


@pytest.fixture(scope="session")
def nan_bundle(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with NaN for every weight, hashed as if it were meant so."""
    path = Path(shutil.copytree(fashion_bundle, tmp_path_factory.mktemp("nan") / "fashion"))
    weights, manifest = path / "model.weights", path / "manifest.json"
    content = b"\xff" * weights.stat().st_size
    weights.write_bytes(content)
    described = json.loads(manifest.read_bytes())
    described["files"]["model.weights"]["sha256"] = hashlib.sha256(content).hexdigest()
    manifest.write_text(json.dumps(described), encoding="utf-8")
    return path
