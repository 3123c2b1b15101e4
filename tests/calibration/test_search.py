# SPDX-License-Identifier: Apache-2.0
"""The search: its ladder, its fixed sequence, and a model where one layer must not be int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import validate
from perceiver_export.calibration.layer_errors import measure_layer_errors
from perceiver_export.calibration.mixed_precision import (
    Rung,
    certify_in_order,
    fixed_order,
    fixed_sequence,
    search,
    steps,
)
from perceiver_export.exporter import export
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.certificates import certificates
from perceiver_export.runtimes.errors import DataError, GateError, UsageError
from tests.calibration.cancelling_units import LAYER, with_cancelling_units
from tests.calibration.damaged_scales import with_a_scale_times

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"


@pytest.fixture(scope="module")
def cancelling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(with_cancelling_units(), tmp_path_factory.mktemp("search") / "model").path


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("splits")
    with np.load(FASHION / "test.npz") as data:
        images, labels = data["image"], data["labels"]
    found = {}
    for name, start, stop in (("calibrate", 0, 40), ("search_on", 40, 340), ("certify_on", 340, 740)):
        found[name] = folder / f"{name}.npz"
        np.savez(found[name], image=images[start:stop], labels=labels[start:stop])
    return found


def test_layers_go_back_one_two_four_of_them() -> None:
    rungs = steps(["a", "b", "c"])

    assert [(list(rung), next(iter(rung.values()), None)) for rung in rungs] == [
        ([], None),
        (["a"], "int8-weights"),
        (["a"], "float"),
        (["a", "b"], "int8-weights"),
        (["a", "b"], "float"),
        (["a", "b", "c"], "int8-weights"),
        (["a", "b", "c"], "float"),
    ]
    assert steps([]) == [{}]


def test_the_safest_is_tested_first_and_the_slower_never() -> None:
    assert fixed_order([0.4, 0.5, 0.6], [True, True, True]) == [2, 1, 0]
    assert fixed_order([0.4, 0.5, 0.6], [False, True, True]) == [2, 1]
    assert fixed_order([0.4, 0.7, 0.6], [False, True, True]) == [2]
    assert fixed_order([0.4], [False]) == []


def test_a_fixed_sequence_stops_at_the_first_that_fails() -> None:
    asked: list[int] = []

    def holds(index: int) -> bool:
        asked.append(index)
        return index != 1

    assert fixed_sequence([2, 1, 0], holds) == 2
    assert asked == [2, 1]
    assert fixed_sequence([1, 2], holds) is None
    assert fixed_sequence([], holds) is None


def test_a_fixed_sequence_keeps_the_error_rate() -> None:
    """Every rung is on the margin, so certifying any is wrong: it happens in 5 %, however many rungs there are."""
    generator = np.random.default_rng(0)
    wrong = sum(fixed_sequence(range(6), lambda index: generator.uniform() < 0.05) is not None for _ in range(4000))

    assert wrong / 4000 < 0.06


def test_a_layer_that_must_not_be_int8_goes_back(cancelling: Path, splits: dict[str, Any], tmp_path: Path) -> None:
    found = search(cancelling, tmp_path / "mixed", **splits, max_drop=5, min_agreement=92)

    assert found.rungs[0].precision == {}
    assert not all(said.startswith("held") for said in found.rungs[0].search)
    kept = found.rungs[found.kept]
    assert next(iter(kept.precision)) == f"{LAYER}.output"
    assert all(said.startswith("held") for said in kept.certification)
    bundle = open_bundle(tmp_path / "mixed", verify="always")
    assert certificates(bundle) == found.certificates
    assert bundle.manifest.name == "mixed"
    assert found.certificates[0].samples == 400
    with pytest.raises(DataError, match=r"300 of 300 samples .* searched on"):
        validate(bundle, splits["search_on"], against=cancelling, max_drop=5, allow_overlap=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "mixed"]


def test_a_search_without_a_gate_or_with_shared_samples_is_refused(
    fashion_bundle: Path, splits: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="good enough"):
        search(fashion_bundle, tmp_path / "mixed", **splits)
    overlapping = {**splits, "certify_on": splits["search_on"]}
    with pytest.raises(DataError, match="300 of 300 samples"):
        search(fashion_bundle, tmp_path / "mixed", **overlapping, max_drop=2)
    assert not (tmp_path / "mixed").exists()


def test_what_held_on_one_split_must_hold_on_the_other(
    int8_bundle: Path, fashion_bundle: Path, splits: dict[str, Any], tmp_path: Path
) -> None:
    tried = [(Rung({}, 0.5, ("held",)), int8_bundle)]
    options: dict[str, Any] = {"against": fashion_bundle, "max_drop": 5}

    def quiet(what: str, done: int, total: int) -> None: ...

    kept, evidence = certify_in_order(tried, [0], splits["certify_on"], "auto", options, quiet)
    assert kept == 0
    assert evidence[0].samples == 400
    assert tried[0][0].certification[0].startswith("held: --max-drop 5")
    with np.load(splits["certify_on"]) as data:
        np.savez(tmp_path / "few.npz", image=data["image"][:20], labels=data["labels"][:20])
    with pytest.raises(GateError, match="could not be certified: undecided: --max-drop 5"):
        certify_in_order(tried, [0], tmp_path / "few.npz", "auto", options, quiet)


def test_a_layer_whose_scale_was_ruined_is_refused_and_named_first(
    int8_bundle: Path, fashion_bundle: Path, tmp_path: Path
) -> None:
    group = "encoder.self_attentions.0.1.mlp.output"
    ruined = with_a_scale_times(4.0, group, int8_bundle, tmp_path / "ruined")

    result = validate(ruined, FASHION / "test.npz", against=fashion_bundle, samples=400, max_drop=1, min_agreement=97)
    errors = measure_layer_errors(ruined, fashion_bundle, FASHION / "test.npz")

    assert [gate.outcome for gate in result.gates].count("held") == 0
    with pytest.raises(GateError):
        result.require()
    assert errors[0].group == group
    assert errors[0].sqnr == pytest.approx(-9.5, abs=1)  # an error of three times the signal
    assert measure_layer_errors(int8_bundle, fashion_bundle, FASHION / "test.npz")[0].sqnr > 10
