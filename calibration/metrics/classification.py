# SPDX-License-Identifier: Apache-2.0
"""Classifiers of anything: top-1, top-5, agreement with the reference, and how far the probabilities moved (KL).

Equal accuracy hides flips (arXiv 2407.09141), so agreement and KL stand beside it. Where labels do not exclude each
other (sound), a sample's target is one of them and KL is that of the softmax.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from perceiver_export.calibration.metrics.base import Column, Columns, Metric, kl
from perceiver_export.runtimes.runtime import Array

METRICS = (
    Metric("top-1", "quality", "higher", "share", "%"),
    Metric("top-5", "quality", "higher", "share", "%"),
    Metric("agreement", "likeness", "higher", "share", "%"),
    Metric("kl", "likeness", "lower", "mean", "nats"),
)
TARGETS: tuple[str, ...] = ("label",)

_TOP = 5


def quality(outputs: Mapping[str, Array], targets: Mapping[str, Array]) -> Columns:
    """``targets["label"]`` is (n,). Top-5 only where there are more than five labels. Ties go to the lower index."""
    logits, labels = outputs["logits"], targets["label"]
    columns = {"top-1": Column.of(logits.argmax(axis=-1) == labels)}
    if logits.shape[-1] > _TOP:
        own = np.take_along_axis(logits, labels[:, None], axis=1)
        ahead = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
        columns["top-5"] = Column.of(ahead.sum(axis=1) < _TOP)
    return columns


def likeness(outputs: Mapping[str, Array], reference: Mapping[str, Array], targets: Mapping[str, Array]) -> Columns:
    """Whether both have the same first label, and KL(reference ‖ candidate)."""
    found, expected = outputs["logits"], reference["logits"]
    same = found.argmax(axis=-1) == expected.argmax(axis=-1)
    return {"agreement": Column.of(same), "kl": Column.of(kl(expected, found))}
