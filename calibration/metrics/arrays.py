# SPDX-License-Identifier: Apache-2.0
"""Outputs whose meaning only their owner knows: relative error, signal to noise ratio and cosine of a sample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from perceiver_export.calibration.metrics.base import Column, Columns, Metric, cosine, sqnr
from perceiver_export.runtimes.runtime import Array

METRICS = (
    Metric("error", "likeness", "lower", "mean", "%"),
    Metric("sqnr", "likeness", "higher", "mean", "dB"),
    Metric("cosine", "likeness", "higher", "mean"),
)
TARGETS: tuple[str, ...] = ()


def quality(outputs: Mapping[str, Array], targets: Mapping[str, Array]) -> Columns:
    """None: what is good, a metric of one's own says."""
    return {}


def likeness(outputs: Mapping[str, Array], reference: Mapping[str, Array], targets: Mapping[str, Array]) -> Columns:
    """The least of the outputs counts, so that a ruined one cannot hide behind others."""
    pairs = [(reference[name], outputs[name]) for name in sorted(reference)]
    ratio = np.min([sqnr(*pair) for pair in pairs], axis=0)
    return {
        "error": Column.of(10 ** (-ratio / 20)),
        "sqnr": Column.of(ratio),
        "cosine": Column.of(np.min([cosine(*pair) for pair in pairs], axis=0)),
    }
