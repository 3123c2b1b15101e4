# SPDX-License-Identifier: Apache-2.0
"""Masked language models: at masked positions, how often the byte is right, and how surprised the model is by it.

A text is the sample, for its positions are not independent: its value is the mean over its masked positions, its
weight their number.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from perceiver_export.calibration.metrics.base import Column, Columns, Metric, kl, log_softmax
from perceiver_export.runtimes.runtime import Array

METRICS = (
    Metric("token accuracy", "quality", "higher", "mean", "%"),
    Metric("perplexity", "quality", "lower", "exp", "a byte"),
    Metric("agreement", "likeness", "higher", "mean", "%"),
    Metric("kl", "likeness", "lower", "mean", "nats"),
)
TARGETS: tuple[str, ...] = ("tokens",)


def quality(outputs: Mapping[str, Array], targets: Mapping[str, Array]) -> Columns:
    """``targets["tokens"]`` (n, length) holds the token under each mask, -1 elsewhere."""
    logits, tokens = outputs["logits"], targets["tokens"]
    masked = tokens >= 0
    right = (logits.argmax(axis=-1) == tokens) & masked
    surprise = np.zeros(tokens.shape)
    chosen = log_softmax(logits[masked])
    surprise[masked] = -chosen[np.arange(len(chosen)), tokens[masked]]
    return {"token accuracy": _mean(right, masked), "perplexity": _mean(surprise, masked)}


def likeness(outputs: Mapping[str, Array], reference: Mapping[str, Array], targets: Mapping[str, Array]) -> Columns:
    """At masked positions, whether both say the same byte, and KL(reference ‖ candidate)."""
    found, expected = outputs["logits"], reference["logits"]
    masked = targets["tokens"] >= 0
    same = (found.argmax(axis=-1) == expected.argmax(axis=-1)) & masked
    divergence = np.zeros(masked.shape)
    divergence[masked] = kl(expected[masked], found[masked])
    return {"agreement": _mean(same, masked), "kl": _mean(divergence, masked)}


def _mean(values: Array, masked: Array) -> Column:
    counts = masked.sum(axis=1)
    return Column.of(values.sum(axis=1) / np.maximum(counts, 1), counts)
