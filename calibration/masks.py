# SPDX-License-Identifier: Apache-2.0
"""Masks among DATA's arrays, read alike by `quantize` and `validate`: 1 is what counts, 0 is what is masked, and where
no mask is given nothing is masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from perceiver_export.runtimes.errors import DataError, InputError
from perceiver_export.runtimes.manifest import TensorSpec
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks.arrays import check_masks

_MASK = "_mask"


def is_mask(name: str) -> bool:
    """Whether an input of that name is the mask of another one."""
    return name.endswith(_MASK)


def with_masks(values: Mapping[str, Any], specs: Iterable[TensorSpec], where: str) -> dict[str, Any]:
    """A sample's ``values`` with ones for each mask that the model takes and the sample has not.

    Raises DataError: a mask of an input that the model has no mask of, so that what is masked would count.
    """
    taken = {spec.name: spec for spec in specs}
    for name in values:
        if is_mask(name) and name not in taken and name.removesuffix(_MASK) in taken:
            raise DataError(
                f"{where} has {name!r}, and the model takes no mask", "leave it out, if nothing in it is masked"
            )
    missing = {name: spec for name, spec in taken.items() if is_mask(name) and name not in values}
    ones = {
        name: np.ones([size for size in spec.shape[1:] if isinstance(size, int)], spec.dtype)
        for name, spec in missing.items()
    }
    return {**values, **ones}


def require_masks(feeds: Mapping[str, Array], specs: Iterable[TensorSpec], where: str) -> None:
    """Raise DataError where a sample's mask holds other values than 0 and 1, or masks everything; a model that runs
    refuses them too.
    """
    try:
        check_masks({name: array[None] for name, array in feeds.items()}, tuple(specs))
    except InputError as error:
        raise DataError(f"{where}: {error.message}", error.hint) from error
