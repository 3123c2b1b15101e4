# SPDX-License-Identifier: Apache-2.0
"""What a metric is, and what many of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from perceiver_export.runtimes.runtime import Array


class Metric(msgspec.Struct, frozen=True):
    """``quality`` is measured against targets, ``likeness`` against the reference's outputs.

    ``share``: each sample counts 0 or 1, and bounds are exact. ``mean``: the weighted mean over samples; ``exp``: its
    exponential, as of perplexities. Both have bootstrap bounds.
    """

    name: str
    of: Literal["quality", "likeness"]
    better: Literal["higher", "lower"]
    kind: Literal["share", "mean", "exp"] = "mean"
    unit: str = ""


@dataclass(frozen=True)
class Column:
    """One value a sample, and its weight in means."""

    values: Array
    weights: Array

    @classmethod
    def of(cls, values: Array, weights: Array | None = None) -> Column:
        """Weight 1 each where none are given."""
        numbers = np.asarray(values, np.float64)
        return cls(numbers, np.ones(len(numbers)) if weights is None else np.asarray(weights, np.float64))


Columns = dict[str, Column]


def log_softmax(logits: Array) -> Array:
    """Logarithms of probabilities along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def kl(reference: Array, found: Array) -> Array:
    """Kullback-Leibler divergence KL(reference ‖ found) of two arrays of logits, along the last axis, in nats."""
    expected, logs = log_softmax(reference), log_softmax(found)
    # Never below 0, which rounding would else bring where both are equal.
    divergence: Array = np.maximum((np.exp(expected) * (expected - logs)).sum(axis=-1), 0.0)
    return divergence


def sqnr(reference: Array, found: Array) -> Array:
    """Signal to quantization noise of each sample (n, ...) in dB; at most 200, which stands for equal."""
    signal = np.square(reference, dtype=np.float64).reshape(len(reference), -1).sum(axis=1)
    noise = np.square(found.astype(np.float64) - reference).reshape(len(reference), -1).sum(axis=1)
    ratio = np.maximum(signal, 1e-300) / np.maximum(noise, 1e-300)
    decibel: Array = np.minimum(10 * np.log10(ratio), 200.0)
    return np.where(noise == 0, 200.0, decibel)


def cosine(reference: Array, found: Array) -> Array:
    """Cosine of the angle between both, for each sample (n, ...); 1 where both are zero."""
    a = reference.reshape(len(reference), -1).astype(np.float64)
    b = found.reshape(len(found), -1).astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products: Array = np.where(lengths > 0, (a * b).sum(axis=1) / np.maximum(lengths, 1e-300), 0.0)
    return np.where((a == 0).all(axis=1) & (b == 0).all(axis=1), 1.0, products)
