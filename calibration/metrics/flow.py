# SPDX-License-Identifier: Apache-2.0
"""Optical flow: end-point error and outliers against the true flow, and how far flows of two models are apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from perceiver_export.calibration.metrics.base import Column, Columns, Metric, sqnr
from perceiver_export.runtimes.runtime import Array

METRICS = (
    Metric("epe", "quality", "lower", "mean", "px"),
    Metric("outliers", "quality", "lower", "mean", "%"),
    Metric("distance", "likeness", "lower", "mean", "px"),
    Metric("sqnr", "likeness", "higher", "mean", "dB"),
)
TARGETS: tuple[str, ...] = ("flow",)

_PIXELS, _SHARE = 3.0, 0.05


def quality(outputs: Mapping[str, Array], targets: Mapping[str, Array]) -> Columns:
    """``targets["flow"]`` (n, H, W, 2); where it is not finite it is unknown, and pixels there do not count.

    Outliers are KITTI's: off by more than 3 pixels and by more than 5 % of the true motion (Menze & Geiger 2015).
    """
    truth = targets["flow"].astype(np.float64)
    known: Array = np.asarray(np.isfinite(truth).all(axis=-1))
    errors = np.where(known, np.linalg.norm(np.where(known[..., None], outputs["flow"] - truth, 0), axis=-1), 0)
    lengths = np.where(known, np.linalg.norm(np.where(known[..., None], truth, 0), axis=-1), 0)
    outliers = (errors > _PIXELS) & (errors > _SHARE * lengths)
    return {"epe": _mean(errors, known), "outliers": _mean(outliers, known)}


def likeness(outputs: Mapping[str, Array], reference: Mapping[str, Array], targets: Mapping[str, Array]) -> Columns:
    """Mean distance of the two flows, and the signal to noise ratio."""
    found, expected = outputs["flow"], reference["flow"]
    distance = np.linalg.norm(found.astype(np.float64) - expected, axis=-1).reshape(len(found), -1).mean(axis=1)
    return {"distance": Column.of(distance), "sqnr": Column.of(sqnr(expected, found))}


def _mean(values: Array, known: Array) -> Column:
    counts = known.sum(axis=(1, 2))
    return Column.of(values.sum(axis=(1, 2)) / np.maximum(counts, 1), counts)
