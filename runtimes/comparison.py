# SPDX-License-Identifier: Apache-2.0
"""Comparing an output with what it should be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perceiver_export.runtimes.runtime import Array


@dataclass(frozen=True)
class Comparison:
    """Largest absolute difference, as a share of the reference's largest absolute value. True if within tolerance.

    A NaN or an infinity on either side is never within it.
    """

    difference: float
    tolerance: float
    scale: float

    def __bool__(self) -> bool:
        return bool(np.isfinite(self.difference)) and self.difference <= self.tolerance

    def __str__(self) -> str:
        return f"differs by {self.difference:.1e} of the output's scale {self.scale:.3g}, {self.tolerance:.0e} allowed"


def compare(found: Array, reference: Array, tolerance: float) -> Comparison:
    """Compare two arrays of one shape. A difference of shapes is a difference without measure (NaN)."""
    if found.shape != reference.shape:
        return Comparison(float("nan"), tolerance, float("nan"))
    exact = reference.astype(np.float64)
    scale = float(np.max(np.abs(exact), initial=0.0))
    largest = float(np.max(np.abs(found.astype(np.float64) - exact), initial=0.0))
    return Comparison(largest / scale if scale > 0 else largest, tolerance, scale)
