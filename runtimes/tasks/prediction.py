# SPDX-License-Identifier: Apache-2.0
"""What classifiers of any data answer with: labels and their probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Prediction:
    """A label, its index and its probability: softmax of the logits, or sigmoid where labels do not exclude others."""

    label: str
    index: int
    probability: float


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Probabilities along the last axis."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: npt.NDArray[np.float32] = exponents / exponents.sum(axis=-1, keepdims=True)
    return probabilities
