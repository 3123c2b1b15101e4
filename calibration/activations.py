# SPDX-License-Identifier: Apache-2.0
"""What is kept of each activation: exact bounds of every channel, and a bounded sample of rows.

From these come ranges, smoothing and bias corrections alike, so the data is gone through once. The memory depends on
the number and widths of the tensors, not on the number of samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from perceiver_export.runtimes.runtime import Array

LARGEST_FLOAT16 = 65_504.0


@dataclass
class Activation:
    """An input of linears. ``low``, ``high`` (K): each channel's exact bounds. ``rows`` (n, K): a uniform sample."""

    low: Array
    high: Array
    rows: Array
    rows_seen: int = 0
    rows_kept: int = 0

    @classmethod
    def empty(cls, width: int, capacity: int) -> Activation:
        """Nothing seen yet, with room for ``capacity`` rows."""
        bounds = np.full(width, np.inf, np.float32)
        return cls(bounds, -bounds, np.zeros((capacity, width), np.float32))

    def add(self, low: Array, high: Array, rows: Array, generator: np.random.Generator) -> None:
        """Take in one call's bounds and rows; rows beyond the capacity replace earlier ones (Vitter's algorithm R)."""
        np.minimum(self.low, low, out=self.low)
        np.maximum(self.high, high, out=self.high)
        for row in rows:
            if self.rows_kept < len(self.rows):
                self.rows[self.rows_kept] = row
                self.rows_kept += 1
            else:
                place = int(generator.integers(self.rows_seen + 1))
                if place < len(self.rows):
                    self.rows[place] = row
            self.rows_seen += 1

    @property
    def sample(self) -> Array:
        """The rows kept, (n, K)."""
        return self.rows[: self.rows_kept]

    @property
    def largest(self) -> Array:
        """Largest absolute value of each channel (K)."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def scaled(self, factors: Array) -> Activation:
        """The same with each channel multiplied by a positive factor."""
        return Activation(
            self.low * factors, self.high * factors, self.sample * factors, self.rows_seen, self.rows_kept
        )


@dataclass
class Hazard:
    """What fp16 would make of a tensor: its largest absolute value, and how many products or terms were summed."""

    largest: float
    depth: int

    @property
    def overflows(self) -> bool:
        """Whether a value, or a sum of ``depth`` ones as in a softmax, is beyond fp16's largest number."""
        return self.largest > LARGEST_FLOAT16 or self.depth > LARGEST_FLOAT16


@dataclass
class Statistics:
    """Of one graph: activations that linears read, and hazards, by the tensors' names."""

    activations: dict[str, Activation] = field(default_factory=dict)
    hazards: dict[str, Hazard] = field(default_factory=dict)
    calls: int = 0
