# SPDX-License-Identifier: Apache-2.0
"""Engines of TensorRT for RTX, compiled without a GPU, and the report beside an engine."""

from __future__ import annotations

from pathlib import Path

import msgspec

from perceiver_export.runtimes.engines import tensorrt
from perceiver_export.runtimes.engines.backend import EngineOptions, Precision, Source
from perceiver_export.runtimes.engines.tensorrt_build import REPORT, LayerReport

__all__ = ["LayerReport", "compile_rtx", "read_report"]


def compile_rtx(graph: Path, directory: Path, device: str = "sm86", precision: Precision = "fp16") -> LayerReport:
    """Compile a graph into a new folder."""
    directory.mkdir()
    options = EngineOptions(precision=precision, flags={"compute_capability": device})
    tensorrt.compile(Source("tensorrt-rtx", graph, options), directory, lambda stage, done, total: None)
    return read_report(directory)


def read_report(directory: Path) -> LayerReport:
    """layers.json."""
    return msgspec.json.decode((directory / REPORT).read_bytes(), type=LayerReport)
