# SPDX-License-Identifier: Apache-2.0
"""All that edits or judges a bundle without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_export.calibration.certificate import certify
    from perceiver_export.calibration.layer_errors import measure_layer_errors
    from perceiver_export.calibration.linting import lint
    from perceiver_export.calibration.mixed_precision import search
    from perceiver_export.calibration.pipeline import quantize
    from perceiver_export.calibration.sensitivity import measure_sensitivity
    from perceiver_export.calibration.targets import validate_targets
    from perceiver_export.calibration.validated import Validation
    from perceiver_export.calibration.validation import validate

__all__ = [
    "Validation",
    "certify",
    "lint",
    "measure_layer_errors",
    "measure_sensitivity",
    "quantize",
    "search",
    "validate",
    "validate_targets",
]

_LAZY = {
    "Validation": "validated",
    "certify": "certificate",
    "lint": "linting",
    "measure_layer_errors": "layer_errors",
    "measure_sensitivity": "sensitivity",
    "quantize": "pipeline",
    "search": "mixed_precision",
    "validate": "validation",
    "validate_targets": "targets",
}


_VALIDATE = ("Validation", "certify", "validate", "validate_targets")  # need less than the others


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("perceiver_export"):
            raise
        from perceiver_export.runtimes.errors import MissingDependencyError

        extra = "validate" if name in _VALIDATE else "quantize"
        raise MissingDependencyError(
            f"{name} needs {error.name}, which is not installed", f"pip install 'perceiver-export[{extra}]'"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
