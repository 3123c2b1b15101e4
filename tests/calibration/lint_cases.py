# SPDX-License-Identifier: Apache-2.0
"""Minimal graphs for the rules of lint, and what TensorRT for RTX makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration.lowering.lint import lint
from perceiver_export.runtimes.engines import tensorrt
from perceiver_export.runtimes.engines.backend import EngineOptions, Precision, Source
from perceiver_export.runtimes.errors import BuildError, BundleError
from tests.calibration.onnx_text import write
from tests.runtimes.tensorrt_reports import LayerReport, read_report

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
    out = path.parent / f"{path.stem}.engine"
    out.mkdir()
    options = EngineOptions(precision=precision, flags={"compute_capability": "sm86"})
    tensorrt.compile(Source("tensorrt-rtx", path, options), out, lambda what, done, total: None)
    return read_report(out)


def refused(path: Path, precision: Precision = "fp16") -> str:
    with pytest.raises((BuildError, BundleError)) as raised:
        compiled(path, precision)
    return raised.value.message
