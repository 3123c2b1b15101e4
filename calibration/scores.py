# SPDX-License-Identifier: Apache-2.0
"""From values of single samples to numbers with bounds: for each metric both sides, and how much worse one is."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from perceiver_export.calibration.drops import drop
from perceiver_export.calibration.metrics.base import Column, Columns, Metric
from perceiver_export.calibration.statistics import Estimate, bootstrap, share
from perceiver_export.runtimes.runtime import Array

_LARGEST_EXPONENT = 700.0  # of float64; a ruined model's surprise may be larger


class MetricResult(msgspec.Struct, frozen=True):
    """One metric. Shares and their bounds are in percent, a worsening of them in points.

    A quality has both sides and ``worsening`` (positive: the candidate is worse), a likeness ``candidate`` alone.
    ``lost``, ``gained``: samples that only the reference, or only the candidate, has right; of shares only.
    """

    name: str
    of: str
    better: str
    unit: str
    candidate: Estimate
    reference: Estimate | None = None
    worsening: Estimate | None = None
    lost: int | None = None
    gained: int | None = None


def measure(metric: Metric, candidate: Column, reference: Column | None) -> MetricResult:
    """One metric of one or two sides."""
    scale = 100.0 if metric.unit == "%" else 1.0
    worse = lost = gained = None
    if reference is not None:
        worse = _scaled(worsening(metric, candidate, reference), scale)
        if metric.kind == "share":
            lost, gained = flips(candidate, reference)
    return MetricResult(
        metric.name,
        metric.of,
        metric.better,
        metric.unit,
        _scaled(estimate(metric, candidate), scale),
        None if reference is None else _scaled(estimate(metric, reference), scale),
        worse,
        lost,
        gained,
    )


def estimate(metric: Metric, column: Column) -> Estimate:
    """One side's value with one-sided bounds, shares as shares: exact for them, by bootstrap for means."""
    count = len(column.values)
    if metric.kind == "share":
        return share(int(column.values.sum()), count)
    found = bootstrap((column.values * column.weights, column.weights), _mean(metric))
    if metric.unit == "%" and found.lower == found.upper:
        wider = _with_rare(found, count)
        return Estimate(wider.value, max(0.0, wider.lower), min(1.0, wider.upper))
    return found


def of_samples(metric: Metric, column: Column) -> Column:
    """Values (n,) of single samples as the metric is shown: shares in percent, perplexities and no logarithms."""
    if metric.kind == "exp":
        return Column(np.exp(np.minimum(column.values, _LARGEST_EXPONENT)), column.weights)
    return Column(column.values * (100.0 if metric.unit == "%" else 1.0), column.weights)


def worsening(metric: Metric, candidate: Column, reference: Column, relative: bool = False) -> Estimate:
    """How much worse the candidate is, positive where it is; as a share of the reference's value if ``relative``."""
    if metric.kind == "share" and not relative:
        return drop(*flips(candidate, reference), len(candidate.values))
    of_side, sign = _mean(metric), 1.0 if metric.better == "lower" else -1.0

    def statistic(found: Array, expected: Array, weights: Array, axis: int = -1) -> Array:
        first, second = of_side(found, weights, axis), of_side(expected, weights, axis)
        change: Array = sign * (first - second) + 0.0  # adding 0 makes -0 a 0
        return change / np.maximum(np.abs(second), 1e-12) if relative else change

    weights = candidate.weights
    found = bootstrap((candidate.values * weights, reference.values * weights, weights), statistic)
    if metric.unit == "%" and found.lower == found.upper:
        level = abs(float(of_side(reference.values * weights, weights))) if relative else 1.0
        return _with_rare(found, len(weights), 1 / max(level, 1e-12))
    return found


def flips(candidate: Column, reference: Column) -> tuple[int, int]:
    """How many samples only the reference has right, and how many only the candidate."""
    found, expected = candidate.values > 0, reference.values > 0
    return int((expected & ~found).sum()), int((found & ~expected).sum())


def joined(parts: list[Columns]) -> Columns:
    """The columns of all batches, one after another."""
    found = {}
    for name in parts[0] if parts else ():
        columns = [part[name] for part in parts]
        values, weights = (np.concatenate([getattr(column, of) for column in columns]) for of in ("values", "weights"))
        found[name] = Column(values, weights)
    return found


def _mean(metric: Metric) -> Callable[..., Array]:
    def mean(values: Array, weights: Array, axis: int = -1) -> Array:
        found: Array = values.sum(axis=axis) / np.maximum(weights.sum(axis=axis), 1e-12)
        return np.exp(found) if metric.kind == "exp" else found

    return mean


def _with_rare(found: Estimate, count: int, scale: float = 1.0) -> Estimate:
    """Bounds of a share where no sample differs from another: resampling knows no more then, but how rare a sample
    that differs is at most, their number says (0 of ``count``).
    """
    rare = scale * share(0, count).upper
    return Estimate(found.value, found.value - rare, found.value + rare)


def _scaled(found: Estimate, scale: float) -> Estimate:
    return Estimate(scale * found.value, scale * found.lower, scale * found.upper)
