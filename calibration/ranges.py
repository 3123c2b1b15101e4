# SPDX-License-Identifier: Apache-2.0
"""From a sample of a tensor to the largest value that int8 should still hold; what lies above is clipped to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.runtime import Array

Method = Literal["mse", "minmax", "percentile", "entropy"]

LEVELS = 127  # of a symmetric int8, on each side of zero
_PERCENTILE = 99.99
_BINS = 2048
_VALUES = 1 << 16  # of a sample that a search looks at


def find_range(method: Method, values: Array, largest: float) -> float:
    """The clipping value for a sample (any shape) of a tensor whose exact largest absolute value is ``largest``.

    Never above ``largest``, never 0 (an all-zero tensor gets 1). Raises UsageError: an unknown method.
    """
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", f"it is one of {', '.join(get_args(Method))}")
    flat = np.abs(values, dtype=np.float32).ravel()
    flat = flat[:: -(-flat.size // _VALUES)] if flat.size > _VALUES else flat
    if largest <= 0.0:
        return 1.0
    found = METHODS[method](flat, largest) if flat.size else largest
    return float(min(found, largest)) or largest


def _minmax(values: Array, largest: float) -> float:
    return largest


def _percentile(values: Array, largest: float) -> float:
    return float(np.percentile(values, _PERCENTILE))


def _mse(values: Array, largest: float) -> float:
    """The value with the least squared error of rounding and clipping together, of 60 from the largest down to 0.1 of it."""
    values = np.append(values, np.float32(largest))  # seen for certain, even if the sample missed it
    candidates = largest * np.geomspace(1.0, 0.1, 60)
    errors = [float(np.square(values - fake_quantize(values, clip)).sum()) for clip in candidates]
    return float(candidates[int(np.argmin(errors))])


def _entropy(values: Array, largest: float) -> float:
    """The clipping with the least relative entropy between the histogram and its 128-level version.

    Migacz, "8-bit Inference with TensorRT" (2017): of a histogram of 2,048 bins the first i are kept, what lies above
    is counted in the last of them; Q spreads each level's count over its non-empty bins.
    """
    counts, edges = np.histogram(values, bins=_BINS, range=(0.0, largest))
    best, clip = np.inf, largest
    for kept in range(LEVELS + 1, _BINS + 1, 8):
        reference = counts[:kept].astype(np.float64)
        # Levels are made of what was inside before outliers are counted in, so that clipping them costs.
        level = np.arange(kept) * (LEVELS + 1) // kept
        filled = reference > 0
        totals = np.bincount(level, weights=reference, minlength=LEVELS + 1)
        shares = np.bincount(level, weights=filled, minlength=LEVELS + 1)
        spread = np.where(filled, (totals / np.maximum(shares, 1))[level], 0.0)
        reference[-1] += counts[kept:].sum()
        divergence = _relative_entropy(reference, spread)
        if divergence < best:
            best, clip = divergence, float(edges[kept])
    return clip


def _relative_entropy(reference: Array, other: Array) -> float:
    """Σ p log(p / q) with both smoothed, so that an empty bin of q under a full one of p costs much, not everything."""
    p, q = (np.where(x > 0, x, 1e-4) / max(float(x.sum()), 1e-12) for x in (reference, other))
    return float(np.sum(p * np.log(p / q)))


def fake_quantize(values: Array, clip: Array | float) -> Array:
    """What int8 makes of values with that clipping: round to the nearest of 255 levels, ties to even."""
    scale = np.asarray(clip, np.float32) / np.float32(LEVELS)
    rounded: Array = np.clip(np.rint(values / scale), -LEVELS - 1, LEVELS) * scale
    return rounded


METHODS: dict[str, Callable[[Array, float], float]] = {
    "mse": _mse,
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
}
