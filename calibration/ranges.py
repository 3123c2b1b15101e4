# SPDX-License-Identifier: Apache-2.0
"""From a sample of a tensor to the largest value that int8 should still hold; what lies above is clipped to it.

These are ours and not a library's: onnxruntime.quantization's entropy is its minmax (128 bins leave one threshold), its
histograms keep every tensor of every sample, and NNCF's minimise the error of the values, not of the products.
"""

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
_ROWS = 128  # of a sample that a search looks at


def find_range(method: Method, rows: Array, largest: float, gram: Array) -> float:
    """The clipping value for sampled ``rows`` (n, K) of a tensor whose exact largest absolute value is ``largest``.

    ``gram`` (K, K) is Σ W Wᵀ of the weights that read it: what an error in a channel costs. Never above ``largest``,
    never 0 (an all-zero tensor gets 1). Raises UsageError: an unknown method.
    """
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", f"it is one of {', '.join(get_args(Method))}")
    if largest <= 0.0:
        return 1.0
    found = METHODS[method](rows, largest, gram) if rows.size else largest
    return float(min(found, largest)) or largest


def _minmax(rows: Array, largest: float, gram: Array) -> float:
    return largest


def _percentile(rows: Array, largest: float, gram: Array) -> float:
    return float(np.percentile(np.abs(rows), _PERCENTILE))


def _mse(rows: Array, largest: float, gram: Array) -> float:
    """The value with the least squared error of the products, Σ e G eᵀ over rows, e what rounding and clipping change.

    The error of the values themselves would clip a few large channels that many small ones outvote, though the weights
    make much of them: on the Fashion-MNIST model that costs 3 to 6 dB.
    """
    rows = rows[:: -(-len(rows) // _ROWS)]
    candidates = largest * np.geomspace(1.0, 0.2, 24)
    changes = [fake_quantize(rows, clip) - rows for clip in candidates]
    errors = [float(np.vdot(change @ gram, change)) for change in changes]
    return float(candidates[int(np.argmin(errors))])


def _entropy(rows: Array, largest: float, gram: Array) -> float:
    """The clipping with the least relative entropy between the histogram and its 128-level version.

    Migacz, "8-bit Inference with TensorRT" (2017): of a histogram of 2,048 bins the first i are kept, what lies above
    is counted in the last of them; Q spreads each level's count over its non-empty bins.
    """
    counts, edges = np.histogram(np.abs(rows), bins=_BINS, range=(0.0, largest))
    best, clip = np.inf, largest
    for kept in range(LEVELS + 1, _BINS + 1, 8):
        inside = counts[:kept].astype(np.float64)
        level = np.arange(kept) * (LEVELS + 1) // kept
        filled = inside > 0
        totals = np.bincount(level, weights=inside, minlength=LEVELS + 1)
        shares = np.bincount(level, weights=filled, minlength=LEVELS + 1)
        spread = np.where(filled, (totals / np.maximum(shares, 1))[level], 0.0)
        # Only the reference counts what was clipped, so that clipping it costs.
        inside[-1] += counts[kept:].sum()
        divergence = _relative_entropy(inside, spread)
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
    rounded: Array = np.asarray(values / scale)
    np.rint(rounded, out=rounded)  # in place: searches do this for every candidate of every tensor
    np.clip(rounded, -LEVELS - 1, LEVELS, out=rounded)
    rounded *= scale
    return rounded


METHODS: dict[str, Callable[[Array, float, Array], float]] = {
    "mse": _mse,
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
}
