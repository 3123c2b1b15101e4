# SPDX-License-Identifier: Apache-2.0
"""Exact bounds of shares and of their paired difference, McNemar's test, and bootstrap bounds of everything else.

All one-sided bounds are wrong at most one time in twenty.

`drop` bounds how far the share of right answers falls from one model to another on the same samples. Of n samples,
``lost`` are right with the reference only and ``gained`` with the candidate only; the drop is p_lost − p_gained. The
test is Tango's score (Stat. Med. 1998). Its null distribution is not assumed to be normal, because that is wrong for
few flips, and flips should be few. Instead, the tail is summed over all outcomes and maximized over the remaining
unknown share, p_gained, within its 99.9 % confidence set; the 0.1 % is added (Berger & Boos, JASA 1994). Neither scipy
nor statsmodels has bounds for a difference of paired shares.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from perceiver_export.runtimes.errors import require
from perceiver_export.runtimes.runtime import Array

CONFIDENCE = 0.95
LEAST_FOR_BOOTSTRAP = 30  # below, resampling says too little about samples that were not drawn
_RESAMPLES = 4_999
_FEW_RESAMPLES, _MANY = 999, 100_000  # fewer for statistics of more than 100,000 numbers
_SMALL = 2_000  # up to here BCa's jackknife is cheap, and its correction of skewness matters
_ELEMENTS = 1 << 22  # drawn at a time


class Estimate(msgspec.Struct, frozen=True):
    """A number with its one-sided bounds: each of ``lower`` and ``upper`` holds with `CONFIDENCE` by itself."""

    value: float
    lower: float
    upper: float

    def times(self, scale: float) -> Estimate:
        """The value and its bounds times ``scale``."""
        return Estimate(*(float(scale * np.float64(number)) for number in (self.value, self.lower, self.upper)))


def rounded(value: float, digits: str, up: bool | None = None) -> str:
    """``value`` with ``digits`` (.3f, .4g); a bound is rounded ``up`` or down, to claim no more than was shown."""
    found, sign = float(f"{value:{digits}}"), -1 if up is False else 1
    if up is not None and sign * (value - found) > 1e-9 * abs(value):
        magnitude = math.floor(math.log10(abs(value))) + 1 if digits[-1] == "g" else 0
        found += sign * 10.0 ** (magnitude - int(digits[-2]))
    return f"{found + 0.0:{digits}}"  # adding 0 turns -0 into 0


class Bounds(NamedTuple):
    """How shares and their paired difference are bounded: `share` and `drop`, or those of `sequential`."""

    kind: Literal["exact", "sequential"]
    share: Callable[[int, int], Estimate]
    drop: Callable[[int, int, int], Estimate]


def share(count: int, total: int) -> Estimate:
    """A share with its one-sided exact bounds (Clopper & Pearson 1934)."""
    lower, upper = (
        scipy_stats().binomtest(count, total, alternative=side).proportion_ci(CONFIDENCE, method="exact")
        for side in ("greater", "less")
    )
    return Estimate(count / total, float(lower.low), float(upper.high))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of the exact test that losses and gains are equally likely (McNemar 1947)."""
    if lost + gained == 0:
        return 1.0
    return float(scipy_stats().binomtest(lost, lost + gained, 0.5).pvalue)


def bootstrap(count: int, statistic: Callable[[Array], Array], width: int = 0, seed: int = 0) -> Estimate:
    """One-sided bounds of a statistic of ``count`` samples, by resampling them (Efron 1987).

    ``statistic`` takes how often each sample was drawn, (..., n), and returns (...). ``width``: numbers per sample
    that make it slow; with many it is resampled fewer times. Bias-corrected and accelerated up to 2,000 samples,
    percentiles beyond. If resampling does not change the statistic, its value is both bounds.
    """
    value = float(statistic(np.ones(count, np.int64)))
    if count < 2:
        return Estimate(value, value, value)

    def of_rows(drawn: Array, axis: int = -1) -> Array:
        rows = drawn.reshape(-1, drawn.shape[-1])
        shifted = rows + count * np.arange(len(rows))[:, None]
        counts = np.bincount(shifted.ravel(), minlength=count * len(rows)).reshape(*drawn.shape[:-1], count)
        return statistic(counts)

    options: dict[str, Any] = {
        "vectorized": True,
        "batch": max(1, _ELEMENTS // count),
        "method": "BCa" if count <= _SMALL else "percentile",
        "n_resamples": _RESAMPLES if count * width <= _MANY else _FEW_RESAMPLES,
        "confidence_level": 2 * CONFIDENCE - 1,  # each end then holds with CONFIDENCE
        "rng": np.random.default_rng(seed),
    }
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore")  # a statistic that does not change: its NaN is handled below
        found = scipy_stats().bootstrap((np.arange(count),), of_rows, **options).confidence_interval
    return Estimate(value, *(float(bound) if np.isfinite(bound) else value for bound in (found.low, found.high)))


def scipy_stats() -> Any:
    """scipy.stats. Raises MissingDependencyError."""
    return require("scipy.stats", "validation", "validate")


OUTSIDE = 1e-3  # probability that p_gained is outside the set that is searched
_GRID = 24
_NEGLIGIBLE = 1e-10
_PRECISION = 1e-3  # of the distance between the estimate and its bound


def drop(lost: int, gained: int, total: int) -> Estimate:
    """The drop as a share of samples, positive if the candidate is worse, with one-sided exact 95 % bounds."""
    value = (lost - gained) / total
    return Estimate(value, -_upper(gained, lost, total), _upper(lost, gained, total))


def p_value(lost: int, gained: int, total: int, margin: float) -> float:
    """The probability of a drop this small, or smaller, if the true drop is ``margin`` (a share) or more."""
    binom = scipy_stats().binom
    observed = float(score(np.array(lost), np.array(gained), total, margin))
    low, high = _within(gained, total)
    most = (1 - margin) / 2
    shares = np.linspace(min(max(low, -margin, 0.0), most), min(high, most), _GRID)[:, None]
    p_lost = np.clip(shares + margin, 0.0, 1.0)
    first = int(binom.ppf(_NEGLIGIBLE, total, p_lost.min()))
    last = int(binom.isf(_NEGLIGIBLE, total, p_lost.max()))
    losses = np.arange(max(first, 0), min(last, total) + 1)
    least = _least_gains(losses, total, margin, observed)
    with np.errstate(invalid="ignore", divide="ignore"):
        given = np.where(p_lost < 1, shares / (1 - p_lost), 0.0)
    tails = binom.pmf(losses, total, p_lost) * binom.sf(least - 1, total - losses, np.clip(given, 0.0, 1.0))
    return min(1.0, float(tails.sum(axis=1).max()) + OUTSIDE)


@functools.lru_cache(4096)
def _within(gained: int, total: int) -> tuple[float, float]:
    """The set of p_gained that is searched: Clopper and Pearson's interval."""
    beta, tail = scipy_stats().beta, OUTSIDE / 2
    low = beta.ppf(tail, gained, total - gained + 1) if gained > 0 else 0.0
    high = beta.isf(tail, gained + 1, total - gained) if gained < total else 1.0
    return float(low), float(high)


def score(lost: Array, gained: Array, total: int, margin: float) -> Array:
    """Tango's statistic: the drop's distance from ``margin`` in standard errors, estimated at that margin."""
    b, c = np.asarray(lost, float), np.asarray(gained, float)
    half = -b - c + (2 * total - b + c) * margin
    root = np.sqrt(np.maximum(half**2 + 8 * total * c * margin * (1 - margin), 0.0))
    at_margin = (root - half) / (4 * total)
    variance = np.maximum(total * (2 * at_margin + margin * (1 - margin)), _NEGLIGIBLE)
    return np.asarray((b - c - total * margin) / np.sqrt(variance))


def _least_gains(losses: Array, total: int, margin: float, observed: float) -> Array:
    """For each number of losses, the least number of gains whose score is as low as the observed one."""
    low, high = np.zeros(len(losses), int), total - losses + 1
    while np.any(low < high):
        middle = (low + high) // 2
        inside = (middle > total - losses) | (score(losses, middle, total, margin) <= observed + 1e-9)
        low, high = np.where(inside | (low >= high), low, middle + 1), np.where(inside, middle, high)
    return low


@functools.lru_cache(4096)
def _upper(lost: int, gained: int, total: int) -> float:
    """The largest margin that the test does not reject."""

    def kept(margin: float) -> bool:
        return p_value(lost, gained, total, min(margin, 1 - 1e-9)) > 1 - CONFIDENCE

    value, step = (lost - gained) / total, math.sqrt(lost + gained + 1) / total
    low, high = value, min(1.0, value + step)
    while kept(high):
        if high == 1:
            return 1.0
        low, high = high, min(1.0, high + step)
    while high - low > _PRECISION * (high - value):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    return high


FIXED = Bounds("exact", share, drop)  # for a number of samples that was fixed in advance
