# SPDX-License-Identifier: Apache-2.0
"""The runtime that an app embeds. It needs numpy, msgspec and, on first use, an engine's library, but never torch.

from perceiver_export.runtimes import load

with load("fashion") as runtime:
    outputs = runtime.run({"image": image})

It logs under the name ``perceiver_export`` without a handler of its own. INFO: loaded bundles, and which targets and
engines are used or rejected, with the reason. DEBUG: more details. WARNING: an engine is compiled again at load.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from perceiver_export.runtimes.errors import *  # noqa: F403

if TYPE_CHECKING:
    from perceiver_export.runtimes.batcher import Batcher as Batcher
    from perceiver_export.runtimes.benchmark import bench as bench
    from perceiver_export.runtimes.building import build as build
    from perceiver_export.runtimes.bundle import Bundle as Bundle
    from perceiver_export.runtimes.bundle import open_bundle as open_bundle
    from perceiver_export.runtimes.diagnosis import doctor as doctor
    from perceiver_export.runtimes.loading import load as load
    from perceiver_export.runtimes.loading import load_onnx as load_onnx
    from perceiver_export.runtimes.manifest import Manifest as Manifest
    from perceiver_export.runtimes.manifest import TensorSpec as TensorSpec
    from perceiver_export.runtimes.presence import devices as devices
    from perceiver_export.runtimes.runtime import Comparison as Comparison
    from perceiver_export.runtimes.runtime import Runtime as Runtime
    from perceiver_export.runtimes.runtime import compare as compare
    from perceiver_export.runtimes.split import decode as decode
    from perceiver_export.runtimes.tasks import open_task as open_task

# Public names by module. Each module is imported on first use, so that an app loads only the code that it calls.
_NAMES = {
    "batcher": "Batcher",
    "benchmark": "bench",
    "building": "build",
    "bundle": "Bundle open_bundle",
    "diagnosis": "doctor",
    "loading": "load load_onnx",
    "manifest": "Manifest TensorSpec",
    "presence": "devices",
    "runtime": "Comparison Runtime compare",
    "split": "decode",
    "tasks": "open_task",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted([*_MODULES, *(name for name in globals() if name.endswith("Error"))])

# Disables onnxruntime's telemetry (its docs/Privacy.md). It is set here because several modules import onnxruntime.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return __all__
