# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a bundle. torch is loaded on first use, not on import."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_export.exporter.describe import inspect_bundle
    from perceiver_export.exporter.loaded import LoadedModel
    from perceiver_export.exporter.own import OwnModel
    from perceiver_export.exporter.pipeline import ExportOptions, export
    from perceiver_export.exporter.presets import PRESETS
    from perceiver_export.exporter.serving import package
    from perceiver_export.exporter.sources import load_model, load_reference

_LAZY = {
    "PRESETS": "presets",
    "ExportOptions": "pipeline",
    "LoadedModel": "loaded",
    "OwnModel": "own",
    "export": "pipeline",
    "inspect_bundle": "describe",
    "load_model": "sources",
    "load_reference": "sources",
    "package": "serving",
}

__all__ = [
    "PRESETS",
    "ExportOptions",
    "LoadedModel",
    "OwnModel",
    "export",
    "inspect_bundle",
    "load_model",
    "load_reference",
    "package",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
