# SPDX-License-Identifier: Apache-2.0
"""Shares with exact bounds, McNemar's test, and bounds of means by paired bootstrap; the numbers are scipy's.

`drops` bounds the difference of two paired shares. All one-sided bounds here are wrong at most one time in twenty.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from perceiver_export.runtimes.errors import MissingDependencyError
from perceiver_export.runtimes.runtime import Array

CONFIDENCE = 0.95
LEAST_FOR_BOOTSTRAP = 30  # below, resampling says too little of what was not drawn
_RESAMPLES = 4_999
_SMALL = 2_000  # up to here BCa's jackknife is cheap, and its correction of skewness matters
_ELEMENTS = 1 << 22  # drawn at a time


class Proportion(msgspec.Struct, frozen=True):
    """``count`` of ``total``, with its two-sided exact (Clopper-Pearson) bounds at `CONFIDENCE`."""

    count: int
    total: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        bounds = f"{100 * self.low:.2f} to {100 * self.high:.2f} %"
        return f"{100 * self.value:.2f} % ({self.count:,} of {self.total:,}; 95 % bounds {bounds})"


class Estimate(msgspec.Struct, frozen=True):
    """A number with its one-sided bounds: each of ``lower`` and ``upper`` holds with `CONFIDENCE` by itself."""

    value: float
    lower: float
    upper: float


def proportion(count: int, total: int) -> Proportion:
    """Exact bounds of a proportion (Clopper & Pearson 1934). Raises MissingDependencyError without scipy."""
    bounds = scipy_stats().binomtest(count, total).proportion_ci(CONFIDENCE, method="exact")
    return Proportion(count, total, count / total, float(bounds.low), float(bounds.high))


def share(count: int, total: int) -> Estimate:
    """A share with its one-sided exact bounds (Clopper & Pearson 1934)."""
    stats = scipy_stats()
    lower = stats.binomtest(count, total, alternative="greater").proportion_ci(CONFIDENCE, method="exact").low
    upper = stats.binomtest(count, total, alternative="less").proportion_ci(CONFIDENCE, method="exact").high
    return Estimate(count / total, float(lower), float(upper))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of the exact test (McNemar 1947) that losses and gains are equally likely."""
    if lost + gained == 0:
        return 1.0
    return float(scipy_stats().binomtest(lost, lost + gained, 0.5).pvalue)


def bootstrap(columns: tuple[Array, ...], statistic: Callable[..., Array], seed: int = 0) -> Estimate:
    """One-sided bounds of a statistic of samples, all columns (n,) of a sample drawn together (Efron 1987).

    ``statistic(*columns, axis)`` reduces ``axis``. Bias-corrected and accelerated up to 2,000 samples, percentiles
    beyond. A statistic that resampling does not move keeps its value as both bounds.
    """
    rows, stats = np.arange(len(columns[0])), scipy_stats()
    constant = [bool(np.all(column == column[0])) for column in columns]  # weights often are: need not be drawn

    def of_rows(drawn: Array, axis: int = -1) -> Array:
        pairs = zip(columns, constant, strict=True)
        found = (np.broadcast_to(column[0], drawn.shape) if same else column[drawn] for column, same in pairs)
        return statistic(*found, axis=axis)

    value = float(of_rows(rows))
    options: dict[str, Any] = {
        "vectorized": True,
        "batch": max(1, _ELEMENTS // len(rows)),
        "method": "BCa" if len(rows) <= _SMALL else "percentile",
        "rng": np.random.default_rng(seed),
    }
    if len(rows) < 2 or all(constant):
        return Estimate(value, value, value)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore")  # a statistic that does not move: handled by its NaN below
        level = 2 * CONFIDENCE - 1  # each end then holds with CONFIDENCE
        found = stats.bootstrap((rows,), of_rows, n_resamples=_RESAMPLES, confidence_level=level, **options)
    low, high = found.confidence_interval.low, found.confidence_interval.high
    return Estimate(value, *(float(bound) if np.isfinite(bound) else value for bound in (low, high)))


def scipy_stats() -> ModuleType:
    """scipy.stats, or MissingDependencyError with the command that brings it."""
    try:
        import scipy.stats
    except ImportError as error:
        raise MissingDependencyError("validation needs scipy", "pip install 'perceiver-export[validate]'") from error
    return scipy.stats
