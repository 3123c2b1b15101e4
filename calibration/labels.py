# SPDX-License-Identifier: Apache-2.0
"""Labels in DATA, read alike by `quantize` and `validate`: a number from 0, or a label's name."""

from __future__ import annotations

from typing import Any

import numpy as np

from perceiver_export.runtimes.errors import DataError

_SHOWN = 12


def label_index(label: Any, labels: tuple[str, ...], where: str, count: int | None = None) -> int:
    """The number of a label, of ``count`` (as many as have names). Of text a name goes first: names may be numbers.

    Raises DataError: no label of this model. A fraction is none, for it would be cut to one.
    """
    if isinstance(label, (np.ndarray, np.generic)) and label.ndim == 0:
        label = label.item()
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    index = _whole(label)
    if index is None:
        named = f", or one of: {', '.join(labels[:_SHOWN])}" if labels else ""
        raise DataError(f"{where}: {label!r} is not a label of this model", f"give an index from 0{named}")
    known = len(labels) if count is None else count
    if not 0 <= index < known:
        raise DataError(f"{where}: label {index} is out of range", f"this model has {known} labels, from 0")
    return index


def _whole(label: Any) -> int | None:
    """The number that a label is, or spells; None where it is none, or a fraction."""
    if isinstance(label, np.ndarray):
        return None
    try:
        index = int(label)
    except (TypeError, ValueError, OverflowError):
        return None
    return index if isinstance(label, str) or index == label else None
