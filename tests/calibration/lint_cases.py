# SPDX-License-Identifier: Apache-2.0
"""Minimal graphs for the rules of lint, and what TensorRT for RTX makes of them; graphs on ONNX Runtime's CPU kernels,
which are a reference for TensorRT's graphs, and not TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from perceiver_export.calibration.lowering.lint import lint
from perceiver_export.calibration.lowering.tensorrt import emulate
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.errors import BuildError, BundleError
from tests.calibration.onnx_text import write
from tests.runtimes.tensorrt_reports import LayerReport, compile_rtx

Arrays = Mapping[str, np.ndarray[Any, Any]]
RNG = np.random.default_rng(0)
ATTENTION = """(float16[1,8,64,{qk}] q, float16[1,8,{qk},64] k, float16[1,8,64,{v}] v) => (float16[1,8,64,{v}] y)
    {{ s = MatMul(q, k)  p = Softmax<axis = -1>(s)  y = MatMul(p, v) }}"""
LINEAR = """(float16[1,64,128] x) => (float16[1,64,128] y)
    { c = QuantizeLinear(x, s, z)  d = DequantizeLinear(c, s, z)
      e = DequantizeLinear<axis = AXIS>(w, t, u)  y = MatMul(d, e) }"""


def scalar(value: float, dtype: Any = np.float16) -> np.ndarray[Any, Any]:
    return np.array(value, dtype)


def int8_linear(path: Path, axis: int = 1, zero: int = 0, kind: Any = np.int8, scale: Any = np.float16) -> Path:
    """A linear as our quantizer writes it, unless told otherwise."""
    weight = RNG.integers(-127, 127, (128, 128)).astype(np.int8)
    return write(
        path,
        LINEAR.replace("AXIS", str(axis)),
        s=scalar(0.05, scale),
        z=scalar(zero, kind),
        w=weight,
        t=np.full(128, 0.01, np.float16),
        u=np.zeros(128, np.int8),
    )


def partly_int8_attention(path: Path) -> Path:
    """Queries and keys in int8, values not."""
    body = """(float16[1,8,64,64] q, float16[1,8,64,64] k, float16[1,8,64,64] v) => (float16[1,8,64,64] y)
        { a = QuantizeLinear(q, s, z)  b = DequantizeLinear(a, s, z)
          c = QuantizeLinear(k, s, z)  d = DequantizeLinear(c, s, z)
          t = MatMul(b, d)  p = Softmax<axis = -1>(t)  y = MatMul(p, v) }"""
    return write(path, body, s=scalar(0.05), z=scalar(0, np.int8))


def rules(path: Path, version: str = "11.4", target: str = "tensorrt") -> set[str]:
    (result,) = lint(path, target, version)
    return {finding.rule for finding in result.findings}


def compiled(path: Path, precision: Precision = "fp16") -> LayerReport:
    """What TensorRT for RTX makes of it."""
    return compile_rtx(path, path.parent / f"{path.stem}.engine", precision=precision)


def refused(path: Path, precision: Precision = "fp16") -> str:
    with pytest.raises((BuildError, BundleError)) as raised:
        compiled(path, precision)
    return raised.value.message


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
