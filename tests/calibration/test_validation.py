# SPDX-License-Identifier: Apache-2.0
"""Validation on the real model and real pictures; gates that hold, and gates that must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import validate
from perceiver_export.calibration.statistics import proportion
from perceiver_export.exporter import export, load_model
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.errors import DataError, GateError, UsageError
from perceiver_export.runtimes.runtime import Array

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"
TEST = FASHION / "test.npz"
README_TOP1 = 0.8672


def test_the_shipped_model_is_as_right_as_the_readme_says(fashion_bundle: Path) -> None:
    result = validate(fashion_bundle, TEST)

    assert result.samples == 10_000
    assert result.top1 is not None
    assert result.top1.value == pytest.approx(README_TOP1, abs=5e-4)  # a few ties fall differently on other CPUs
    assert result.agreement is None


def test_the_bundle_agrees_with_torch(fashion_bundle: Path) -> None:
    model = load_model(FASHION / "checkpoint")

    def reference(pictures: Array) -> Array:
        return model.run({"image": pictures})["logits"]

    result = validate(fashion_bundle, TEST, against=reference, samples=500, max_drop=0, min_agreement=99)
    result.require()

    assert result.agreement is not None
    assert result.agreement.count == 500
    assert result.top1 == result.reference_top1
    assert result.drop == 0


def test_every_form_of_data_gives_the_same(fashion_bundle: Path, tmp_path: Path) -> None:
    with np.load(TEST) as data:
        images, labels = data["image"][:20], data["labels"][:20]
    with open_task(fashion_bundle) as task:
        prepared = np.stack([task.preprocess(image) for image in images])
    np.savez(tmp_path / "colour.npz", image=np.repeat(images[..., None], 3, -1), labels=labels)
    np.savez(tmp_path / "prepared.npz", image=prepared, labels=labels)

    expected = validate(fashion_bundle, TEST, samples=20)
    assert validate(fashion_bundle, tmp_path / "colour.npz") == expected
    assert validate(fashion_bundle, tmp_path / "prepared.npz") == expected


def test_pictures_with_a_csv(fashion_bundle: Path) -> None:
    result = validate(fashion_bundle, FASHION / "pictures")

    assert result.top1 is not None
    assert result.top1.total == 10


def test_a_ruined_model_does_not_pass(fashion_bundle: Path, tmp_path: Path) -> None:
    loaded = load_model(FASHION / "checkpoint")
    dict(loaded.model.named_parameters())["encoder.self_attentions.0.0.mlp.output.weight"].data.mul_(8)
    ruined = export(loaded, tmp_path / "ruined").path

    result = validate(ruined, TEST, against=fashion_bundle, samples=500, max_drop=1, min_agreement=95)

    assert [gate.held for gate in result.gates] == [False, False]
    with pytest.raises(GateError, match="NOT HELD"):
        result.require()


def test_a_gate_is_on_the_bound_and_not_on_the_measured_share(fashion_bundle: Path) -> None:
    result = validate(fashion_bundle, TEST, against=fashion_bundle, samples=50, min_agreement=99)

    assert result.agreement is not None
    assert result.agreement.value == 1.0
    assert [gate.held for gate in result.gates] == [False]  # 50 samples cannot show 99 %


def test_nan_outputs_are_a_failure_and_never_a_pass(fashion_bundle: Path) -> None:
    def broken(inputs: Any) -> Any:
        return np.full((len(inputs), 10), np.nan, np.float32)

    with pytest.raises(GateError, match="NaN"):
        validate(fashion_bundle, TEST, against=broken, samples=5)


def test_what_makes_no_sense_is_refused(fashion_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a reference"):
        validate(fashion_bundle, TEST, max_drop=1)
    with pytest.raises(UsageError):
        validate(fashion_bundle, TEST, samples=0)
    np.savez(tmp_path / "unlabelled.npz", image=np.zeros((3, 28, 28), np.uint8))
    with pytest.raises(DataError, match="no labels"):
        validate(fashion_bundle, tmp_path / "unlabelled.npz", against=fashion_bundle, max_drop=1)
    np.savez(tmp_path / "nan.npz", image=np.full((3, 3, 28, 28), np.nan, np.float32))
    with pytest.raises(DataError, match="NaN"):
        validate(fashion_bundle, tmp_path / "nan.npz")
    np.savez(tmp_path / "small.npz", image=np.zeros((3, 3, 14, 14), np.float32))
    with pytest.raises(DataError, match="shape"):
        validate(fashion_bundle, tmp_path / "small.npz")


def test_bundles_that_do_not_compare_are_not_compared(fashion_bundle: Path, tmp_path: Path) -> None:
    other = export("preset:imagenet-conv", tmp_path / "other", shape={"image": (3, 32, 32)}).path
    larger = export(FASHION / "checkpoint", tmp_path / "larger", shape={"image": (3, 32, 32)}).path

    with pytest.raises(UsageError, match="different labels"):
        validate(fashion_bundle, TEST, against=other)
    with pytest.raises(UsageError, match="prepare pictures differently"):
        validate(fashion_bundle, TEST, against=larger)


@pytest.mark.parametrize("count", [0, 1, 50, 99, 100])
def test_exact_bounds_cover_what_they_say(count: int) -> None:
    """Clopper-Pearson by its definition: at each bound, the tail beyond the count has 2.5 %."""
    from scipy.stats import binom

    bounds = proportion(count, 100)

    assert bounds.low <= bounds.value <= bounds.high
    if count > 0:
        assert binom.sf(count - 1, 100, bounds.low) == pytest.approx(0.025)
    if count < 100:
        assert binom.cdf(count, 100, bounds.high) == pytest.approx(0.025)
