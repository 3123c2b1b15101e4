# SPDX-License-Identifier: Apache-2.0
"""Proportions with exact bounds; the numbers are scipy's."""

from __future__ import annotations

import msgspec

from perceiver_export.runtimes.errors import MissingDependencyError

CONFIDENCE = 0.95


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


def proportion(count: int, total: int) -> Proportion:
    """Exact bounds of a proportion (Clopper & Pearson 1934). Raises MissingDependencyError without scipy."""
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise MissingDependencyError("validation needs scipy", "pip install 'perceiver-export[validate]'") from error
    bounds = binomtest(count, total).proportion_ci(CONFIDENCE, method="exact")
    return Proportion(count, total, count / total, float(bounds.low), float(bounds.high))
