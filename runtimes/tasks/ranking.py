# SPDX-License-Identifier: Apache-2.0
"""The most probable labels of one sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.tasks.prediction import Prediction


def rank(probabilities: npt.NDArray[np.float32], labels: Sequence[str], top: int) -> list[Prediction]:
    """The ``top`` labels of probabilities (labels,), most probable first; without names the index is the label.

    Raises UsageError: ``top`` below 1.
    """
    check_top(top)
    best = np.argsort(-probabilities, kind="stable")[:top]
    return [Prediction(labels[i] if labels else str(i), int(i), float(probabilities[i])) for i in best]


def check_top(top: int) -> None:
    """Raise UsageError where ``top`` is below 1; asked for before a model runs for long."""
    if top < 1:
        raise UsageError(f"top is {top}", "ask for 1 or more labels")


def sigmoid(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Probabilities of labels that do not exclude each other."""
    # Both branches keep the exponent at or below 0, so that nothing overflows.
    exponents = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1, exponents) / (1 + exponents), dtype=np.float32)
