# SPDX-License-Identifier: Apache-2.0
"""The runtime that an app embeds: numpy and the manifest reader, an engine library on first use, never torch.

from perceiver_export.runtimes import load

with load("fashion") as runtime:
    outputs = runtime.run({"image": image})
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.errors import PerceiverExportError
from perceiver_export.runtimes.loading import load, load_onnx
from perceiver_export.runtimes.manifest import Manifest, TensorSpec
from perceiver_export.runtimes.runtime import Runtime

if TYPE_CHECKING:
    from perceiver_export.runtimes.batcher import Batcher
    from perceiver_export.runtimes.benchmark import bench
    from perceiver_export.runtimes.building import build
    from perceiver_export.runtimes.comparison import Comparison, compare
    from perceiver_export.runtimes.diagnosis import doctor
    from perceiver_export.runtimes.presence import devices
    from perceiver_export.runtimes.queries import decode
    from perceiver_export.runtimes.tasks import open_task

__all__ = [
    "Batcher",
    "Bundle",
    "Comparison",
    "Manifest",
    "PerceiverExportError",
    "Runtime",
    "TensorSpec",
    "bench",
    "build",
    "compare",
    "decode",
    "devices",
    "doctor",
    "load",
    "load_onnx",
    "open_bundle",
    "open_task",
]

# Imported on first use: an app that only runs arrays does not pay for them.
_LAZY = {
    "Batcher": "batcher",
    "Comparison": "comparison",
    "bench": "benchmark",
    "build": "building",
    "compare": "comparison",
    "decode": "queries",
    "devices": "presence",
    "doctor": "diagnosis",
    "open_task": "tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
