# SPDX-License-Identifier: Apache-2.0
"""Bounds against their definitions: by enumeration where that is possible, by published and scipy's numbers else."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from perceiver_export.calibration.drops import drop, p_value, score
from perceiver_export.calibration.gates import RELATIVE, Gate, Wanted, at_least, at_most, mean_at_most, require
from perceiver_export.calibration.metrics.base import Column, Metric
from perceiver_export.calibration.scores import worsening
from perceiver_export.calibration.statistics import Estimate, bootstrap, mcnemar, proportion, share
from perceiver_export.runtimes.errors import GateError, UndecidedError
from perceiver_export.runtimes.runtime import Array


def mean(values: Array, axis: int = -1) -> Array:
    return np.asarray(values.mean(axis=axis))


@pytest.mark.parametrize("count", [0, 1, 50, 99, 100])
def test_exact_bounds_cover_what_they_say(count: int) -> None:
    """Clopper-Pearson by its definition: at each bound, the tail beyond the count has 2.5 %, one-sided 5 %."""
    two_sided, one_sided = proportion(count, 100), share(count, 100)

    for low, high, tail in ((two_sided.low, two_sided.high, 0.025), (one_sided.lower, one_sided.upper, 0.05)):
        assert low <= count / 100 <= high
        if count > 0:
            assert stats.binom.sf(count - 1, 100, low) == pytest.approx(tail)
        if count < 100:
            assert stats.binom.cdf(count, 100, high) == pytest.approx(tail)


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
    found = bootstrap((values,), mean)
    half = stats.t.ppf(0.95, 399) * values.std(ddof=1) / 20

    assert found.value == pytest.approx(values.mean())
    assert found.lower == pytest.approx(values.mean() - half, abs=0.02)
    assert found.upper == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap((np.full(50, 2.0),), mean) == Estimate(2.0, 2.0, 2.0)
    assert bootstrap((values,), mean) == found  # no chance in it


def gate_on_drop(lost: int, gained: int, total: int, asked: float) -> Gate:
    found = drop(lost, gained, total)
    points = Estimate(100 * found.value, 100 * found.lower, 100 * found.upper)
    spread = 100 * np.sqrt((lost + gained) / total)
    return at_most(Wanted("--max-drop", "drop", "the drop", asked, "points"), points, total, spread, asked / 100)


@pytest.mark.parametrize(
    ("lost", "gained", "total", "asked", "outcome"),
    [
        (10, 8, 5000, 0.5, "held"),
        (0, 0, 1000, 0.5, "held"),
        (150, 20, 2000, 1.0, "not held"),
        (0, 0, 3, 1.0, "undecided"),
        (30, 20, 1000, 1.5, "undecided"),
        (30, 20, 1000, 0.5, "undecided"),
        (0, 0, 1000, 0.0, "undecided"),
    ],
)
def test_a_gate_holds_fails_or_is_undecided(lost: int, gained: int, total: int, asked: float, outcome: str) -> None:
    gate = gate_on_drop(lost, gained, total, asked)

    assert gate.outcome == outcome
    assert gate.held == (outcome == "held")


def test_the_number_of_samples_that_would_decide_does() -> None:
    gate = gate_on_drop(30, 20, 1000, 1.5)
    needed = gate.samples_to_decide
    assert needed is not None
    assert needed > 1000
    generator = np.random.default_rng(0)
    decided = 0
    for _ in range(40):
        lost, gained, _ = generator.multinomial(needed, [0.03, 0.02, 0.95])
        decided += p_value(int(lost), int(gained), needed, 0.015) <= 0.05
    assert decided >= 0.6 * 40  # 80 % power, and what 40 draws of it may be off

    silent = gate_on_drop(0, 0, 3, 1.0).samples_to_decide
    assert silent is not None
    assert gate_on_drop(0, 0, silent, 1.0).held
    assert gate_on_drop(0, 0, 1000, 0.0).samples_to_decide is None


def test_agreement_is_held_against_its_lower_bound() -> None:
    def gate(right: int, total: int) -> Gate:
        return at_least(Wanted("--min-agreement", "agreement", "agreement", 99.0, "%"), share(right, total), total)

    assert gate(299, 299).outcome == "held"
    assert gate(298, 298).outcome == "undecided"
    assert gate(900, 1000).outcome == "not held"
    assert gate(50, 50).samples_to_decide == 299
    assert gate(995, 1000).samples_to_decide is not None


def test_few_samples_never_decide_a_mean() -> None:
    close, wanted = Estimate(0.0, -0.01, 0.01), Wanted("--max-metric-change", "epe", "epe", 0.1, "px")

    assert mean_at_most(wanted, close, 29).outcome == "undecided"
    assert mean_at_most(wanted, close, 30).outcome == "held"


@pytest.mark.parametrize("limit", [3.0, 0.5])
def test_the_number_of_texts_that_would_decide_does(limit: float) -> None:
    """Equal sides: bounds are 0 plus or minus 7.05 points with 41 texts, and 0.75 with 400."""
    accuracy = Metric("token accuracy", "quality", "higher", "mean", "%")
    wanted = Wanted("--max-drop", "drop", "the drop", limit, "points")

    def gate(count: int) -> Gate:
        column = Column.of(np.linspace(0.4, 0.6, count))
        found = worsening(accuracy, column, column)
        points = Estimate(100 * found.value, 100 * found.lower, 100 * found.upper)
        return mean_at_most(wanted, points, count)

    few = gate(41)
    assert "measured 0, 95 % bounds by bootstrap -7.05 and 7.05 points" in str(few)
    assert few.outcome == "undecided"
    assert few.samples_to_decide is not None
    assert 41 < few.samples_to_decide < 10**6
    assert gate(few.samples_to_decide).held
    with pytest.raises(UndecidedError) as caught:
        require((few,))
    assert f"about {few.samples_to_decide:,} samples would decide" in caught.value.hint


def test_samples_that_are_all_alike_never_decide_a_mean() -> None:
    """Resampling equal values gives bounds of width 0, which say nothing of a sample that was not drawn."""
    wanted = Wanted("--max-metric-change", "epe", "epe", 0.1, "px")

    gate = mean_at_most(wanted, Estimate(0.0, 0.0, 0.0), 1000)

    assert (gate.outcome, gate.samples_to_decide) == ("undecided", None)
    with pytest.raises(UndecidedError) as caught:
        require((gate,))
    assert "no sample differs" in caught.value.hint


@pytest.mark.parametrize("count", [31, 299])
def test_means_of_shares_that_are_all_alike_are_bounded_by_counts(count: int) -> None:
    """Token accuracy of equal models: a rare text that differs may be among 1 - 0.05^(1/n) of all."""
    accuracy = Metric("token accuracy", "quality", "higher", "mean", "%")
    column = Column.of(np.full(count, 0.5))
    rare = 1 - 0.05 ** (1 / count)

    assert worsening(accuracy, column, column).upper == pytest.approx(rare)
    assert worsening(accuracy, column, column, relative=True).upper == pytest.approx(2 * rare)
    assert worsening(accuracy, column, column).value == 0


def test_a_gate_is_shown_as_it_was_typed() -> None:
    assert Wanted("--max-metric-change", "epe", "epe", 2.0, RELATIVE).typed == "--max-metric-change 2%"
    assert Wanted("--min-agreement", "agreement", "agreement", 99.5, "%").typed == "--min-agreement 99.5"


def test_what_does_not_hold_and_what_is_undecided_are_told_apart() -> None:
    undecided, failed = gate_on_drop(0, 0, 3, 1.0), gate_on_drop(150, 20, 2000, 1.0)

    require((gate_on_drop(0, 0, 1000, 0.5),))
    with pytest.raises(UndecidedError, match=r"^undecided.* 3 samples cannot tell") as caught:
        require((undecided,))
    assert "301" in caught.value.hint
    assert "fresh" in caught.value.hint
    with pytest.raises(GateError, match=r"^not held: --max-drop 1:") as failure:
        require((undecided, failed))
    assert not isinstance(failure.value, UndecidedError)
