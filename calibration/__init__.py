# SPDX-License-Identifier: Apache-2.0
"""Everything that changes or evaluates a bundle without PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_export.calibration.lowering.lint import lint as lint
    from perceiver_export.calibration.lowering.tensorrt import lower_bundle as lower_bundle
    from perceiver_export.calibration.quantization.options import QuantizeOptions as QuantizeOptions
    from perceiver_export.calibration.quantization.pipeline import collect_statistics as collect_statistics
    from perceiver_export.calibration.quantization.pipeline import quantize as quantize
    from perceiver_export.calibration.quantization.search import search as search
    from perceiver_export.calibration.quantization.sensitivity import measure_layer_errors as measure_layer_errors
    from perceiver_export.calibration.quantization.sensitivity import measure_sensitivity as measure_sensitivity
    from perceiver_export.calibration.report.profile import profile as profile
    from perceiver_export.calibration.validation.certify import certify as certify
    from perceiver_export.calibration.validation.options import Gates as Gates
    from perceiver_export.calibration.validation.options import ValidateOptions as ValidateOptions
    from perceiver_export.calibration.validation.planning import plan as plan
    from perceiver_export.calibration.validation.results import Validation as Validation
    from perceiver_export.calibration.validation.shards import merge as merge
    from perceiver_export.calibration.validation.shards import validate_shard as validate_shard
    from perceiver_export.calibration.validation.validation import validate as validate
    from perceiver_export.calibration.validation.validation import validate_targets as validate_targets

# Public names by module. Each module is imported on first use.
_NAMES = {
    "lowering.lint": "lint",
    "lowering.tensorrt": "lower_bundle",
    "quantization.options": "QuantizeOptions",
    "quantization.pipeline": "collect_statistics quantize",
    "quantization.search": "search",
    "quantization.sensitivity": "measure_layer_errors measure_sensitivity",
    "report.profile": "profile",
    "validation.certify": "certify",
    "validation.options": "Gates ValidateOptions",
    "validation.results": "Validation",
    "validation.planning": "plan",
    "validation.shards": "merge validate_shard",
    "validation.validation": "validate validate_targets",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("perceiver_export"):
            raise
        from perceiver_export.runtimes.errors import MissingDependencyError, install_command

        extra = "validate" if _MODULES[name].startswith("validation") else "quantize"
        raise MissingDependencyError(
            f"{name} needs {error.name}, which is not installed", install_command(extra)
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
