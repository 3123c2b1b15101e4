# SPDX-License-Identifier: Apache-2.0
"""Bundles of the demo's model that tests of calibration share; read them, do not change them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from perceiver_export.calibration import QuantizeOptions, quantize
from perceiver_export.calibration.lowering.tensorrt import lower_bundle
from perceiver_export.exporter import export
from tests.calibration.damaged_scales import rehashed, with_a_scale_times
from tests.conftest import FASHION, MadeOnce


@pytest.fixture(scope="session")
def int4_bundle(fashion_bundle: Path, made_once: MadeOnce) -> Path:
    """The same with weights in int4, where their shapes allow it."""
    data, options = FASHION / "held_out.npz", QuantizeOptions(scheme="int4-weights", samples=8)
    return made_once("fashion-int4", lambda path: quantize(fashion_bundle, data, path, options))


@pytest.fixture
def copied_int8(int8_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo's bundle in int8, to be certified."""
    return Path(shutil.copytree(int8_bundle, tmp_path / "fashion-int8"))


@pytest.fixture(scope="session")
def lowered_bundle(fashion_bundle: Path, made_once: MadeOnce) -> Path:
    """The same in fp32 with a graph in fp16 for TensorRT."""

    def make(path: Path) -> None:
        shutil.copytree(fashion_bundle, path)
        lower_bundle(path, "fp16")

    return made_once("fashion-lowered", make)


@pytest.fixture(scope="session")
def text_bundle(made_once: MadeOnce) -> Path:
    """The trained byte-level language model."""
    return made_once("text", lambda path: export(FASHION.parent / "text_bytes" / "checkpoint", path))


@pytest.fixture(scope="session")
def ruined(fashion_bundle: Path, made_once: MadeOnce) -> Path:
    """The demo's model with one layer's weights times 40."""
    group = "encoder.self_attentions.0.0.mlp.output"
    return made_once("ruined", lambda path: with_a_scale_times(40, group, fashion_bundle, path, ".weight"))


@pytest.fixture(scope="session")
def nan_bundle(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with NaN for every weight, hashed as if it were meant so."""
    path = Path(shutil.copytree(fashion_bundle, tmp_path_factory.mktemp("nan") / "fashion"))
    weights = path / "model.weights"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    return rehashed(path)
