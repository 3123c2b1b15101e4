# SPDX-License-Identifier: Apache-2.0
"""How far the share of right answers may have fallen from one model to another on the same samples: exact bounds.

Of n samples, ``lost`` are right with the reference only, ``gained`` with the candidate only; the drop is p_lost −
p_gained. What is tested is Tango's score (Stat. Med. 1998). Its null distribution is not taken to be normal, which
errs where flips are few, as they should be: the tail is summed over all outcomes and maximized over the one unknown
share that is left, p_gained, within a 99.9 % confidence set of it whose 0.1 % is added (Berger & Boos, JASA 1994).
Neither scipy nor statsmodels has bounds of a difference of paired shares.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from perceiver_export.calibration.statistics import CONFIDENCE, Estimate, scipy_stats
from perceiver_export.runtimes.runtime import Array

OUTSIDE = 1e-3  # probability that p_gained is outside the set that is searched
_GRID = 24
_NEGLIGIBLE = 1e-10
_PRECISION = 1e-3  # of the distance between the estimate and its bound


def drop(lost: int, gained: int, total: int) -> Estimate:
    """The drop as a share of samples, positive where the candidate is worse, with one-sided exact 95 % bounds."""
    value = (lost - gained) / total
    return Estimate(value, -_upper(gained, lost, total), _upper(lost, gained, total))


def p_value(lost: int, gained: int, total: int, margin: float) -> float:
    """How likely so small a drop, or a smaller one, is if the true drop is ``margin`` (a share) or more."""
    binom = scipy_stats().binom
    observed = float(score(np.array(lost), np.array(gained), total, margin))
    low, high = _set_of(gained, total)
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


def score(lost: Array, gained: Array, total: int, margin: float) -> Array:
    """Tango's statistic: the drop's distance from ``margin`` in standard errors, estimated at that margin."""
    b, c = np.asarray(lost, float), np.asarray(gained, float)
    half = -b - c + (2 * total - b + c) * margin
    root = np.sqrt(np.maximum(half**2 + 8 * total * c * margin * (1 - margin), 0.0))
    at_margin = (root - half) / (4 * total)
    variance = np.maximum(total * (2 * at_margin + margin * (1 - margin)), _NEGLIGIBLE)
    found: Array = (b - c - total * margin) / np.sqrt(variance)
    return found


def _least_gains(losses: Array, total: int, margin: float, observed: float) -> Array:
    """For each number of losses the least number of gains whose score is as low as the observed one."""
    low, high = np.zeros(len(losses), int), total - losses + 1
    while np.any(low < high):
        middle = (low + high) // 2
        inside = (middle > total - losses) | (score(losses, middle, total, margin) <= observed + 1e-9)
        low, high = np.where(inside | (low >= high), low, middle + 1), np.where(inside, middle, high)
    return low


def _set_of(count: int, total: int) -> tuple[float, float]:
    bounds = scipy_stats().binomtest(count, total).proportion_ci(1 - OUTSIDE, method="exact")
    return float(bounds.low), float(bounds.high)


@functools.lru_cache(4096)
def _upper(lost: int, gained: int, total: int) -> float:
    """The largest margin that the test does not refuse."""
    value = (lost - gained) / total
    step = math.sqrt(lost + gained + 1) / total
    low, high = value, min(1.0, value + step)
    while high < 1 and p_value(lost, gained, total, high) > 1 - CONFIDENCE:
        low, high = high, min(1.0, high + step)
    if high >= 1 and p_value(lost, gained, total, 1 - 1e-9) > 1 - CONFIDENCE:
        return 1.0
    while high - low > _PRECISION * (high - value):
        middle = (low + high) / 2
        if p_value(lost, gained, total, middle) > 1 - CONFIDENCE:
            low = middle
        else:
            high = middle
    return float(high)
