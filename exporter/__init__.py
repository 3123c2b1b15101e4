# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a bundle. torch is loaded on first use, not on import."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_export.exporter.describe import inspect_bundle as inspect_bundle
    from perceiver_export.exporter.loaded import LoadedModel as LoadedModel
    from perceiver_export.exporter.own import OwnModel as OwnModel
    from perceiver_export.exporter.pipeline import ExportOptions as ExportOptions
    from perceiver_export.exporter.pipeline import export as export
    from perceiver_export.exporter.presets import PRESETS as PRESETS
    from perceiver_export.exporter.serving import package as package
    from perceiver_export.exporter.sources import load_model as load_model
    from perceiver_export.exporter.sources import load_reference as load_reference

# Public names by module. Each module is imported on first use.
_NAMES = {
    "describe": "inspect_bundle",
    "loaded": "LoadedModel",
    "own": "OwnModel",
    "pipeline": "ExportOptions export",
    "presets": "PRESETS",
    "serving": "package",
    "sources": "load_model load_reference",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
