# SPDX-License-Identifier: Apache-2.0
"""Graphs on ONNX Runtime's CPU kernels: a reference for TensorRT's graphs, not TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from perceiver_export.calibration.lowering.tensorrt import emulate

Arrays = Mapping[str, np.ndarray[Any, Any]]


def run(model: ir.Model | Path, feeds: Arrays, folder: Path | None = None) -> Arrays:
    """On ONNX Runtime; a graph in 16 bits is rounded after every node."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if isinstance(model, Path):
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    else:
        emulate(model)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        content = ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
