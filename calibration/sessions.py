# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime sessions on graphs that are being worked on, whose weights stay in the bundle's file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from perceiver_export.runtimes.errors import BundleError, ExportError, MissingDependencyError

_SILENT = 4
_TYPED_OPSET = 21  # the first whose QuantizeLinear has `output_dtype`


def _broken(model: ir.Model) -> list[str]:
    """Optimizers of onnxruntime (1.32) that spoil the graph.

    One makes uint8 of int8 activations, and leaves the `output_dtype` which another wrote: the graph is refused then.
    Integer weights alone need no such change, and int8 beside int4 weights, which need the opset, is only checked here.
    """
    return ["QDQS8ToU8Transformer"] if model.opset_imports.get("", 0) >= _TYPED_OPSET else []


def open_session(
    model: ir.Model,
    folder: Path,
    threads: int | None = None,
    config: Mapping[str, str] | None = None,
    in_order: bool = False,
) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU; external weights are read from ``folder``.

    ``in_order``: nodes run in the order of the graph, and memory is taken as they go; by itself onnxruntime runs all
    of the graph before small nodes beside it, and keeps room for all tensors of a call from the second one on.
    ``config`` are session options by name; the name `optimized_model_filepath` and `enable_profiling` among them are
    attributes. Raises BundleError where onnxruntime refuses the graph, ExportError where it cannot write what was asked
    for, MissingDependencyError.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "calibration runs the model on onnxruntime, which is not installed",
            "pip install 'perceiver-export[quantize]'",
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    if in_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    for name, value in (config or {}).items():
        if "." in name:
            options.add_session_config_entry(name, value)
        else:
            setattr(options, name, value if name != "enable_profiling" else True)
    serialized = ir.to_proto(model).SerializeToString()
    try:
        return onnxruntime.InferenceSession(
            serialized, options, providers=["CPUExecutionProvider"], disabled_optimizers=_broken(model)
        )
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        first_line = str(error).splitlines()[0]
        if "Failed to write" in first_line:  # what it made of the graph, where that was asked for
            raise ExportError(
                f"the disk of the temporary directory {tempfile.gettempdir()} is full",
                "free some space there, or name another directory with TMPDIR",
            ) from error
        raise BundleError(f"onnxruntime refuses the graph: {first_line}", "report it with the bundle") from error
