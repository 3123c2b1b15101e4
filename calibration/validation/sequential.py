# SPDX-License-Identifier: Apache-2.0
"""Bounds that hold at all numbers of samples at once, so that a run may stop as soon as its gates are decided.

A gambler bets against the claim that the drop is ``margin`` m or more. A sample is X = 1 if only the reference is
right, −1 if only the candidate is, else 0, and a bet λ multiplies the capital by 1 + λ(m − X). If the claim is true, no
bet grows on average, so the capital, which starts at 1, ever reaches 20 with a probability of at most 1/20, whatever
the stopping rule (Ville 1939). The capital is the mean over bets λ = c / (1 − m) for a grid of c fixed in advance: a
mixture of betting martingales (Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting",
J. R. Stat. Soc. B 86, 2024: K_n(m) = Π (1 + λ_i(m) (X_i − m)), and the mixture of their grid-Kelly bettor). It depends
on the counts alone, and increases with m. So the margins that it does not reject form a confidence sequence.

The package confseq has such bounds too; its last release is of January 2023.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from perceiver_export.calibration.validation.statistics import CONFIDENCE, Bounds, Estimate
from perceiver_export.runtimes.runtime import Array

# As shares of the largest bet. Large ones win where flips are rare, small ones where the drop is close to the margin.
_BETS = 0.99 * 2.0 ** -np.arange(8)
_STEPS = 50  # of a bisection


def log_capital(lost: Array | int, gained: Array | int, total: Array | int, margin: float) -> Array:
    """Logarithm of the capital (...) after ``total`` samples; counts (...) broadcast."""
    kept = np.asarray(total) - lost - gained
    counts = np.stack(np.broadcast_arrays(lost, gained, kept), axis=-1)
    returns = np.log1p(np.multiply.outer(_BETS / (1 - margin), margin - np.array([1, -1, 0])))
    logs = counts @ returns.T
    largest = logs.max(axis=-1, keepdims=True)
    return np.asarray(largest[..., 0] + np.log(np.exp(logs - largest).mean(axis=-1)))


def drop(lost: int, gained: int, total: int) -> Estimate:
    """As `statistics.drop`, with bounds that hold wherever the run stops."""
    return Estimate((lost - gained) / total, -_upper(gained, lost, total), _upper(lost, gained, total))


def share(count: int, total: int) -> Estimate:
    """As `statistics.share`, with bounds that hold wherever the run stops."""
    rest = drop(total - count, 0, total)
    return Estimate(count / total, max(0.0, 1 - rest.upper), min(1.0, 1 - rest.lower))


@functools.lru_cache(4096)
def _upper(lost: int, gained: int, total: int) -> float:
    """The largest drop that the capital does not reject."""
    low, high = (lost - gained) / total, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        refused = middle < 1 and log_capital(lost, gained, total, middle) >= -math.log1p(-CONFIDENCE)
        low, high = (low, middle) if refused else (middle, high)
    return high


ANYTIME = Bounds("sequential", share, drop)
