# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a bundle. torch is loaded on first use, not on import."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_export.exporter.inspection import inspect_bundle
    from perceiver_export.exporter.load import load_model
    from perceiver_export.exporter.loaded import LoadedModel
    from perceiver_export.exporter.packaging import package
    from perceiver_export.exporter.pipeline import export
    from perceiver_export.exporter.presets import PRESETS
    from perceiver_export.exporter.reference import load_reference

__all__ = ["PRESETS", "LoadedModel", "export", "inspect_bundle", "load_model", "load_reference", "package"]

_LAZY = {
    "PRESETS": "presets",
    "LoadedModel": "loaded",
    "export": "pipeline",
    "inspect_bundle": "inspection",
    "load_model": "load",
    "load_reference": "reference",
    "package": "packaging",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
