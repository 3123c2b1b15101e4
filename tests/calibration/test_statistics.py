# SPDX-License-Identifier: Apache-2.0
"""Bounds against their definitions: by enumeration where that is possible, by published and scipy's numbers else."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from scipy import optimize, stats

from perceiver_export.calibration.validation.gates import AT_LEAST, AT_MOST, RELATIVE, Gate, Wanted, decide, require
from perceiver_export.calibration.validation.metrics.base import Column, Metric
from perceiver_export.calibration.validation.scores import worsening
from perceiver_export.calibration.validation.statistics import (
    Estimate,
    bootstrap,
    drop,
    mcnemar,
    p_value,
    rounded,
    score,
    share,
)
from perceiver_export.runtimes.errors import GateError, UndecidedError
from perceiver_export.runtimes.runtime import Array


@pytest.mark.parametrize("count", [0, 1, 50, 99, 100])
def test_exact_bounds_cover_what_they_say(count: int) -> None:
    """Clopper-Pearson by its definition: at each bound, the tail beyond the count has 5 %."""
    found = share(count, 100)

    assert found.lower <= count / 100 <= found.upper
    if count > 0:
        assert stats.binom.sf(count - 1, 100, found.lower) == pytest.approx(0.05)
    if count < 100:
        assert stats.binom.cdf(count, 100, found.upper) == pytest.approx(0.05)


@pytest.mark.parametrize(("flips", "total", "lower"), [(0, 1000, 99.70), (10, 1000, 98.31), (10, 5000, 99.66)])
def test_lower_bounds_of_agreement(flips: int, total: int, lower: float) -> None:
    assert 100 * share(total - flips, total).lower == pytest.approx(lower, abs=0.005)


def test_the_bounds_of_a_drop_are_exact_by_enumeration() -> None:
    """All outcomes of 12 samples, for true shares on a grid: the drop is above its upper bound in at most 5 %."""
    total = 12
    outcomes = [(lost, gained) for lost in range(total + 1) for gained in range(total + 1 - lost)]
    bounds = [drop(lost, gained, total) for lost, gained in outcomes]
    for p_lost in np.linspace(0, 1, 16):
        for p_gained in np.linspace(0, 1 - p_lost, 16):
            rest = max(0.0, 1 - p_lost - p_gained)
            chances = stats.multinomial(total, [p_lost, p_gained, rest]).pmf(
                [(lost, gained, total - lost - gained) for lost, gained in outcomes]
            )
            true = p_lost - p_gained
            above = sum(chance for chance, bound in zip(chances, bounds, strict=True) if bound.upper < true - 1e-9)
            below = sum(chance for chance, bound in zip(chances, bounds, strict=True) if bound.lower > true + 1e-9)
            assert above <= 0.05
            assert below <= 0.05


def test_the_bound_of_a_drop_is_close_to_the_normal_one_where_that_is_good() -> None:
    lost, gained, total = 300, 280, 10_000
    deviation = np.sqrt(lost + gained - (lost - gained) ** 2 / total) / total
    normal = (lost - gained) / total + stats.norm.ppf(0.95) * deviation

    assert drop(lost, gained, total).upper == pytest.approx(normal, rel=0.02)
    assert drop(0, 0, 1000).upper == pytest.approx(3 / 1000, rel=0.01)  # the rule of three
    assert drop(3, 0, 3).upper == 1.0
    assert drop(60, 45, 10_000).lower == -drop(45, 60, 10_000).upper


@pytest.mark.parametrize(("lost", "gained", "total", "margin"), [(1, 0, 44, 0.1), (6, 9, 40, 0.05), (5, 8, 90, -0.02)])
def test_the_score_is_tangos(lost: int, gained: int, total: int, margin: float) -> None:
    """By its definition: the variance is that of the likeliest shares whose difference is the margin."""

    def unlikely(p_gained: float) -> float:
        p_lost = p_gained + margin
        shares = np.array([p_lost, p_gained, 1 - p_lost - p_gained])
        counts = np.array([lost, gained, total - lost - gained])
        return -float(np.sum(counts[counts > 0] * np.log(shares[counts > 0])))

    bounds = (max(0.0, -margin) + 1e-12, (1 - margin) / 2 - 1e-12)
    likeliest = optimize.minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    variance = 2 * likeliest + margin - margin**2

    expected = (lost - gained - total * margin) / np.sqrt(total * variance)
    assert float(score(np.array(lost), np.array(gained), total, margin)) == pytest.approx(expected, rel=1e-4)


def test_p_values_are_near_one_half_at_the_estimate_and_small_far_off() -> None:
    assert p_value(60, 45, 10_000, 0.0015) > 0.4
    assert p_value(60, 45, 10_000, 0.01) < 0.01


def test_mcnemar_is_exact() -> None:
    from statsmodels.stats.contingency_tables import mcnemar as reference

    for lost, gained in ((3, 11), (0, 5), (40, 38)):
        expected = reference([[50, lost], [gained, 7]], exact=True).pvalue
        assert mcnemar(lost, gained) == pytest.approx(expected)
    assert mcnemar(0, 0) == 1.0


def test_bootstrap_bounds_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)

    def mean(counts: Array) -> Array:
        return np.asarray(counts @ values / 400)

    found = bootstrap(400, mean)
    half = stats.t.ppf(0.95, 399) * values.std(ddof=1) / 20

    assert found.value == pytest.approx(values.mean())
    assert found.lower == pytest.approx(values.mean() - half, abs=0.02)
    assert found.upper == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap(50, lambda counts: np.full(counts.shape[:-1], 2.0)) == Estimate(2.0, 2.0, 2.0)
    assert bootstrap(400, mean) == found  # no chance in it


DROP = Wanted("--max-drop", "drop", AT_MOST, 0.0, "points")
AGREEMENT = Wanted("--min-agreement", "agreement", AT_LEAST, 0.0, "%")
EPE = Wanted("--max-metric-change", "epe", AT_MOST, 0.0, "px")
ACCURACY = Metric("token accuracy", "quality", "higher", "fraction", "%")


def gate_on_drop(lost: int, gained: int, total: int, asked: float) -> Gate:
    spread = 100 * float(np.sqrt((lost + gained) / total))
    wanted = msgspec.structs.replace(DROP, limit=asked)
    return decide(wanted, drop(lost, gained, total).times(100), total, spread)


def gate_on_agreement(right: int, total: int) -> Gate:
    found = share(right, total)
    spread = 100 * float(np.sqrt(found.value * (1 - found.value)))
    return decide(msgspec.structs.replace(AGREEMENT, limit=99.0), found.times(100), total, spread)


def gate_on_mean(lower: float, upper: float, total: int) -> Gate:
    return decide(msgspec.structs.replace(EPE, limit=0.1), Estimate(0.0, lower, upper), total)


def gate_on_texts(count: int, limit: float) -> Gate:
    """Equal sides: bounds are 0 plus or minus 7.05 points with 41 texts, and 0.75 with 400."""
    column = Column.of(np.linspace(0.4, 0.6, count))
    found = worsening(ACCURACY, column, column).times(100)
    return decide(msgspec.structs.replace(DROP, limit=limit), found, count)


@pytest.mark.parametrize(
    ("gate", "outcome"),
    [
        (gate_on_drop(10, 8, 5000, 0.5), "held"),
        (gate_on_drop(0, 0, 1000, 0.5), "held"),
        (gate_on_drop(150, 20, 2000, 1.0), "not held"),
        (gate_on_drop(0, 0, 3, 1.0), "undecided"),
        (gate_on_drop(30, 20, 1000, 1.5), "undecided"),
        (gate_on_drop(30, 20, 1000, 0.5), "undecided"),
        (gate_on_drop(0, 0, 1000, 0.0), "undecided"),
        (gate_on_agreement(299, 299), "held"),
        (gate_on_agreement(298, 298), "undecided"),
        (gate_on_agreement(995, 1000), "undecided"),
        (gate_on_agreement(900, 1000), "not held"),
        (gate_on_mean(-0.01, 0.01, 29), "undecided"),  # few samples never decide a mean
        (gate_on_mean(-0.01, 0.01, 30), "held"),
        # Resampling equal values gives bounds of width 0, which say nothing of a sample that was not drawn.
        (gate_on_mean(0.0, 0.0, 1000), "undecided"),
    ],
)
def test_a_gate_holds_fails_or_is_undecided(gate: Gate, outcome: str) -> None:
    assert (gate.outcome, gate.held) == (outcome, outcome == "held")


def test_the_number_of_samples_that_would_decide_does() -> None:
    needed = gate_on_drop(30, 20, 1000, 1.5).samples_to_decide
    assert needed is not None
    assert needed > 1000
    drawn = np.random.default_rng(0).multinomial(needed, [0.03, 0.02, 0.95], size=40)
    decided = sum(p_value(int(lost), int(gained), needed, 0.015) <= 0.05 for lost, gained, _ in drawn)
    assert decided >= 0.6 * 40  # 80 % power, and what 40 draws of it may be off

    silent = gate_on_drop(0, 0, 3, 1.0).samples_to_decide
    assert silent is not None
    assert gate_on_drop(0, 0, silent, 1.0).held
    assert gate_on_drop(0, 0, 1000, 0.0).samples_to_decide is None
    assert gate_on_agreement(50, 50).samples_to_decide == 299
    assert gate_on_agreement(995, 1000).samples_to_decide is not None


@pytest.mark.parametrize("limit", [3.0, 0.5])
def test_the_number_of_texts_that_would_decide_does(limit: float) -> None:
    few = gate_on_texts(41, limit)
    assert str(few).startswith(
        f"NOT ENOUGH DATA  drop ≤ {limit:g} points: between −7.047 and 7.047, 95 % bounds by bootstrap"
    )
    assert few.samples_to_decide is not None
    assert 41 < few.samples_to_decide < 10**6
    assert gate_on_texts(few.samples_to_decide, limit).held
    with pytest.raises(UndecidedError) as caught:
        require((few,))
    assert f"about {few.samples_to_decide:,} fresh samples" in caught.value.hint


@pytest.mark.parametrize("count", [31, 299])
def test_means_of_shares_that_are_all_alike_are_bounded_by_counts(count: int) -> None:
    """Token accuracy of equal models: a rare text that differs may be among 1 - 0.05^(1/n) of all."""
    column, rare = Column.of(np.full(count, 0.5)), 1 - 0.05 ** (1 / count)

    assert worsening(ACCURACY, column, column).upper == pytest.approx(rare)
    assert worsening(ACCURACY, column, column, relative=True).upper == pytest.approx(2 * rare)
    assert worsening(ACCURACY, column, column).value == 0


def test_a_gate_is_shown_as_it_was_typed() -> None:
    assert Wanted("--max-metric-change", "epe", AT_MOST, 2.0, RELATIVE).typed == "--max-metric-change 2%"
    assert Wanted("--min-agreement", "agreement", AT_LEAST, 99.5, "%").typed == "--min-agreement 99.5"
    gate = gate_on_drop(10, 8, 5000, 0.6)
    upper = rounded(gate.upper, ".3f", up=True)
    assert gate.upper <= float(upper) < gate.upper + 0.001
    assert str(gate) == f"PASS  drop ≤ 0.6 points: at most {upper} with 95 % confidence (measured 0.04)"
    assert gate.sentence == f"the loss is at most {upper} points (0.6 allowed)"


@pytest.mark.parametrize(
    ("value", "digits", "up", "shown"),
    [
        (0.00619, ".3f", True, "0.007"),
        (0.007, ".3f", True, "0.007"),
        (99.7399, ".2f", False, "99.73"),
        (-0.0004, "+.3f", True, "+0.000"),
        (0.0099999, ".4g", True, "0.01"),
        (1.00019e-4, ".3g", False, "0.0001"),
        (12.346, ".4g", None, "12.35"),
        (math.inf, ".4g", True, "inf"),
    ],
)
def test_bounds_are_rounded_outward(value: float, digits: str, up: bool | None, shown: str) -> None:
    assert rounded(value, digits, up) == shown


def test_what_does_not_hold_and_what_is_undecided_are_told_apart() -> None:
    undecided, failed = gate_on_drop(0, 0, 3, 1.0), gate_on_drop(150, 20, 2000, 1.0)

    require((gate_on_drop(0, 0, 1000, 0.5),))
    for gate, hint in (
        (undecided, "301 fresh samples, or more if answers flip more often than in these: 3 are too few"),
        (gate_on_mean(0, 0, 1000), "no sample differs"),
    ):
        with pytest.raises(UndecidedError, match=r"^NOT ENOUGH DATA") as caught:
            require((gate,))
        assert hint in caught.value.hint
    with pytest.raises(GateError, match=r"^FAIL  drop ≤ 1 points: .*; NOT ENOUGH DATA") as failure:
        require((undecided, failed))
    assert not isinstance(failure.value, UndecidedError)
