# SPDX-License-Identifier: Apache-2.0
"""Every model of the zoo is exported, gives what torch gives, and is folded where that pays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from perceiver_export.calibration import QuantizeOptions, quantize
from perceiver_export.exporter import OwnModel, export
from perceiver_export.runtimes import Bundle, open_bundle
from tests.benchmarks.zoo import exact_error
from tests.conftest import MadeOnce
from tests.exporter.outputs import assert_bundle_gives
from tests.zoo.models import ZOO

# Folding would cost more than it saves: their attention has many heads over few tokens.
UNPROFITABLE = ("blip2_qformer", "sam_two_way")


@pytest.fixture
def exported(name: str, made_once: MadeOnce) -> Bundle:
    """The model of the test as a bundle; do not change it."""
    return open_bundle(made_once(f"zoo of others {name}", lambda path: export(OwnModel(*ZOO[name]()), path)))


@pytest.mark.parametrize("name", ZOO)
def test_a_model_that_nobody_here_wrote(name: str, exported: Bundle) -> None:
    module, inputs = ZOO[name]()
    folds = exported.manifest.parts["model"].folds

    assert folds, "no product was recognised"
    assert any(one.chosen == "folded" for one in folds) == (name not in UNPROFITABLE)
    assert all(one.why for one in folds)
    with torch.no_grad():
        expected = {exported.part().outputs[0].name: module(**inputs).numpy()}
    assert_bundle_gives(exported, {key: value.numpy() for key, value in inputs.items()}, expected)


@pytest.mark.parametrize("name", ["perceiver_learned", "edgetam_perceiver", "siglip_head"])
def test_folds_are_exact_in_float64(name: str) -> None:
    assert exact_error(*ZOO[name]()) <= 1e-12


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("name", ["edgetam_perceiver", "idefics_resampler"])
def test_every_linear_runs_in_integers_on_both_engines(exported: Bundle, tmp_path: Path) -> None:
    made = quantize(exported, "random", tmp_path / "int8", QuantizeOptions(samples=2))

    assert made.manifest.quantization is not None
    assert made.manifest.quantization.integer_share == {"ort-cpu": 1.0, "openvino-cpu": 1.0}
