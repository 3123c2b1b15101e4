# SPDX-License-Identifier: Apache-2.0
"""All that judges a bundle on data, without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_export.calibration.linting import lint
    from perceiver_export.calibration.validation import Validation, validate

__all__ = ["Validation", "lint", "validate"]

_LAZY = {"Validation": "validation", "lint": "linting", "validate": "validation"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
