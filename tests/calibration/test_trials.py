# SPDX-License-Identifier: Apache-2.0
"""Rungs on trial, with bundles that are there already: what a search does with one that gives NaN, or cannot decide."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from perceiver_export.calibration.ladder import Ladder
from perceiver_export.calibration.layer_errors import measure_layer_errors
from perceiver_export.calibration.plan import decibels
from perceiver_export.calibration.trials import Trials
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.errors import BrokenReferenceError, GateError, UndecidedError

TEST = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist" / "test.npz"


class Ready:
    """A ladder whose rungs are made: bundles, the riskiest first."""

    def __init__(self, bundles: Sequence[Path]) -> None:
        self.rungs = bundles

    def raised(self, index: int) -> dict[str, str]:
        return {f"layer {number}": "float" for number in range(index)}

    def build(self, index: int, path: Path) -> None:
        shutil.copytree(self.rungs[index], path)


def on_trial(fp32: Path, folder: Path, *rungs: Path, **gates: Any) -> Trials:
    settings = {"against": open_bundle(fp32), "against_device": "ort-cpu", "threads": 1, **gates}
    ladder = cast("Ladder", Ready(rungs))
    return Trials(ladder, folder, "mixed", ("ort-cpu",), settings, False, lambda what, done, total: None)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with np.load(TEST) as data:
        path = tmp_path_factory.mktemp("data") / "few.npz"
        np.savez(path, image=data["image"][:100], labels=data["labels"][:100])
    return path


def test_a_rung_with_nan_does_not_hold_and_the_search_goes_on(
    nan_bundle: Path, int8_bundle: Path, fashion_bundle: Path, few: Path, tmp_path: Path
) -> None:
    trials = on_trial(fashion_bundle, tmp_path, nan_bundle, int8_bundle, max_drop=5)

    order = trials.search(few, 0.0)
    kept, evidence = trials.certify(order, few)

    assert (order, kept) == ([1], 1)
    assert trials.rungs[0].search == (
        "failed: the candidate (fashion on ort-cpu) gives NaN or infinite values for few.npz[0]",
    )
    assert evidence[0].held
    assert not trials.path(0).exists()


def test_where_every_rung_gives_nan_nothing_holds(
    nan_bundle: Path, fashion_bundle: Path, few: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        GateError, match=r"no mixture of precisions holds: failed: the candidate .* gives NaN"
    ) as caught:
        on_trial(fashion_bundle, tmp_path, nan_bundle, max_drop=5).search(few, 0.0)
    assert not isinstance(caught.value, UndecidedError)


def test_nan_in_certification_is_no_pass(
    nan_bundle: Path, int8_bundle: Path, fashion_bundle: Path, few: Path, tmp_path: Path
) -> None:
    """What overflows may be in the second split only."""
    trials = on_trial(fashion_bundle, tmp_path, int8_bundle, max_drop=5)
    (step,) = trials.search(few, 0.0)
    shutil.rmtree(trials.path(step))
    shutil.copytree(nan_bundle, trials.path(step))

    with pytest.raises(GateError, match=r"could not be certified: failed: the candidate .* gives NaN"):
        trials.certify([step], few)


def test_a_reference_that_gives_nan_ends_the_search_at_once(
    nan_bundle: Path, int8_bundle: Path, few: Path, tmp_path: Path
) -> None:
    """No rung could ever hold against it, so to ask for less would be no help."""
    trials = on_trial(nan_bundle, tmp_path, int8_bundle, int8_bundle, max_drop=5)

    with pytest.raises(
        BrokenReferenceError,
        match=r"^the reference \(fashion on ort-cpu\) gives NaN or infinite values for few\.npz\[0\]",
    ) as caught:
        trials.search(few, 0.0)

    assert "another reference" in caught.value.hint
    assert not trials.path(1).exists()


def test_a_sample_that_breaks_both_sides_is_told_of_the_reference(nan_bundle: Path, few: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokenReferenceError, match="the reference"):
        on_trial(nan_bundle, tmp_path, nan_bundle, max_drop=5).search(few, 0.0)


def test_too_few_samples_leave_a_search_undecided(
    int8_bundle: Path, fashion_bundle: Path, few: Path, tmp_path: Path
) -> None:
    trials = on_trial(fashion_bundle, tmp_path, int8_bundle, max_drop=0.1)

    with pytest.raises(UndecidedError, match=r"no mixture of precisions holds: undecided: --max-drop 0\.1"):
        trials.search(few, 0.0)


def test_layers_that_are_not_finite_are_the_worst(nan_bundle: Path, fashion_bundle: Path) -> None:
    errors = measure_layer_errors(nan_bundle, fashion_bundle, TEST, samples=2)

    assert errors[0].sqnr == -200.0
    assert decibels(np.ones(3), np.array([1.0, np.nan, 1.0])) == -200.0
    assert decibels(np.ones(3), np.array([1.0, np.inf, 1.0])) == -200.0
