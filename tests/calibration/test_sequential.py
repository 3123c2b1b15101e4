# SPDX-License-Identifier: Apache-2.0
"""Sequential bounds by exact sums over all paths, and runs that stop early; plans by enumeration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from perceiver_export.calibration import Gates, certify, plan, validate
from perceiver_export.calibration.validation import sequential
from perceiver_export.calibration.validation.planning import POWERS, power_of_drop
from perceiver_export.calibration.validation.statistics import p_value, share
from perceiver_export.runtimes.errors import DataError, GateError, UsageError
from tests.calibration.asked import TEST, asked, judged, pictures
from tests.cli.commands import succeed

TWENTY = math.log(20)


@pytest.mark.parametrize(("p_lost", "margin"), [(0.3, 0.3), (0.31, 0.3), (0.5, 0.1), (0.06, 0.05)])
def test_the_capital_reaches_20_in_at_most_5_percent(p_lost: float, margin: float) -> None:
    """All paths of 120 samples, looked at after each; the drop is the margin, so that the capital keeps its mean."""
    p_gained, size, crossed = p_lost - margin, 121, 0.0
    chance = np.zeros((size, size))
    chance[0, 0] = 1.0
    lost, gained = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    for total in range(1, size):
        moved = (1 - p_lost - p_gained) * chance
        moved[1:] += p_lost * chance[:-1]
        moved[:, 1:] += p_gained * chance[:, :-1]
        chance, there = moved, lost + gained <= total
        capital = sequential.log_capital(lost, np.minimum(gained, total - lost), np.array(total), margin)
        logs = np.where(there, capital, -np.inf)
        if total == 10:
            assert float((chance * np.exp(logs)).sum()) == pytest.approx(1)
        over = logs >= TWENTY
        if total >= 10:
            crossed += float(chance[over].sum())
            chance = np.where(over, 0, chance)
    assert crossed <= 0.05


@pytest.mark.parametrize(("lost", "gained", "total"), [(0, 0, 600), (6, 4, 2_000), (300, 280, 10_000), (3, 0, 3)])
def test_bounds_are_where_the_capital_is_20_and_wider_than_those_of_a_fixed_number(
    lost: int, gained: int, total: int
) -> None:
    found = sequential.drop(lost, gained, total)

    if found.upper < 1:
        assert sequential.log_capital(lost, gained, total, found.upper) == pytest.approx(TWENTY, rel=1e-3)
    assert found.lower == -sequential.drop(gained, lost, total).upper
    assert p_value(lost, gained, total, min(found.upper, 1 - 1e-9)) <= 0.05 or found.upper == 1
    agreement, exact = sequential.share(total - lost, total), share(total - lost, total)
    assert agreement.lower <= exact.lower <= agreement.value <= exact.upper <= agreement.upper <= 1


def test_a_run_stops_when_its_gates_are_decided_and_the_certificate_says_so(
    copied_int8: Path, fashion_bundle: Path, thousand: Path
) -> None:
    options = asked(against=fashion_bundle, sequential=True, seed=7, max_drop=10, min_agreement=80, certify=True)

    found = validate(copied_int8, thousand, options)

    assert found == validate(copied_int8, thousand, options)
    assert [gate.outcome for gate in found.gates] == ["held", "held"]
    assert [gate.bounds for gate in found.gates] == ["sequential", "sequential"]
    assert found.samples < 500
    assert len(found.data.labels) == 10
    assert f"{found.samples} of 1,000 samples in the order of seed 7" in str(certify(copied_int8, [found])[0])


def test_a_ruined_model_is_stopped_at_the_first_look_and_too_few_samples_decide_nothing(
    ruined: Path, int8_bundle: Path, fashion_bundle: Path, thousand: Path, tmp_path: Path
) -> None:
    found = judged(ruined, thousand, against=fashion_bundle, sequential=True, min_agreement=95)
    few = judged(
        int8_bundle, pictures(tmp_path / "few.npz", slice(0, 70)), against=fashion_bundle, sequential=True, max_drop=1
    )

    assert found.samples == 64
    with pytest.raises(GateError, match="FAIL"):
        found.require()
    assert (few.samples, few.gates[0].outcome) == (70, "undecided")
    assert few.data.sequential.startswith("took all 70 samples")
    assert (few.gates[0].samples_to_decide or 0) > 500


@pytest.mark.parametrize(
    ("given", "data", "error"),
    [
        ({"metric": "kl", "max_metric_change": 1}, TEST, UsageError),
        ({}, TEST, UsageError),
        ({"max_drop": 1, "seed": -1}, TEST, UsageError),
        ({"max_drop": 1}, "tests.calibration.test_sequential:nothing", DataError),
    ],
)
def test_runs_that_cannot_be_sequential(
    given: dict[str, Any], data: Any, error: type[Exception], fashion_bundle: Path
) -> None:
    with pytest.raises(error):
        judged(fashion_bundle, data, against=fashion_bundle, sequential=True, **given)


def nothing() -> list[dict[str, Any]]:
    return []


@pytest.mark.parametrize(("lost", "gained"), [(0.05, 0.05), (0.12, 0.02), (0.0, 0.0)])
def test_the_power_of_a_drop_is_a_sum_over_all_outcomes(lost: float, gained: float) -> None:
    total, margin = 40, 0.25
    expected = 0.0
    for b in range(total + 1):
        for c in range(total + 1 - b):
            weight = float(stats.multinomial(total, [lost, gained, 1 - lost - gained]).pmf([b, c, total - b - c]))
            expected += weight if weight > 1e-9 and p_value(b, c, total, margin) <= 0.05 else 0.0

    assert power_of_drop(total, lost, gained, margin) == pytest.approx(expected, abs=1e-5)


def test_a_plan_names_enough_samples() -> None:
    plans = {(one.option, one.limit): one.samples for one in plan(Gates(max_drop=10, min_agreement=95), 2)}

    assert plans[("--min-agreement", 97.5)] > plans[("--min-agreement", 95.0)]
    for power, count in zip(POWERS, plans[("--max-drop", 5.0)], strict=True):
        assert count is not None
        assert power <= power_of_drop(count, 0.01, 0.01, 0.05) < power + 0.1
    assert plan(Gates(min_agreement=99), 2)[1].samples == (None, None, None)  # 2 % of answers differ, 1 % may
    wide = plan(Gates(max_drop=60, min_agreement=40), 2)
    assert [one.limit for one in wide] == [30, 70, 60, 40]  # and neither 120 nor -20
    assert "no number" in succeed("validate", "--plan", "--min-agreement", "99", "--flips", "2%")
    shown = json.loads(succeed("validate", "--plan", "--max-drop", "10", "--flips", "0.5%", "--json"))
    assert [one["limit"] for one in shown["plans"]] == [5, 10, 20]
