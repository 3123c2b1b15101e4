# SPDX-License-Identifier: Apache-2.0
"""Products whose answers show what an engine multiplied in.

Run as a program with a target and a precision it prints that and what the engine says, in JSON: instruction sets are
capped by environment variables that libraries read once.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from perceiver_export.runtimes.engines.backend import Array, Engine, EngineOptions, Precision, Source, find_target

# Half the distance from 1 to the next number: the largest relative error of a rounding.
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


def write_product(path: Path, rows: int, weight: Array, scale: Array | None = None) -> Path:
    """x (rows, K) × weight (K, N) -> y; weights that are integers have a ``scale`` for each column."""
    from tests.calibration.onnx_text import write

    ends = f"(float[{rows},{weight.shape[0]}] x) => (float[{rows},{weight.shape[1]}] y)"
    if scale is None:
        return write(path, f"{ends} {{ y = MatMul(x, weight) }}", 17, weight=weight)
    body = f"{ends} {{ floats = DequantizeLinear<axis = 1>(weight, scale)  y = MatMul(x, floats) }}"
    return write(path, body, 17, weight=weight, scale=scale)


def write_chain(path: Path, rows: int, weight: Array, transposed: tuple[bool, ...]) -> Path:
    """x (rows, N) -> y: products with one weight (N, N), as it is or ``transposed``, each with a tanh."""
    from tests.calibration.onnx_text import write

    nodes, given = "", "x"
    for layer, swapped in enumerate(transposed):
        found = "y" if layer + 1 == len(transposed) else f"x{layer}"
        nodes += f"m{layer} = {'Gemm<transB = 1>' if swapped else 'MatMul'}({given}, w)  {found} = Tanh(m{layer})  "
        given = found
    ends = f"(float[{rows},{len(weight)}] x) => (float[{rows},{len(weight)}] y)"
    return write(path, f"{ends} {{ {nodes} }}", 17, w=weight)


def open_product(path: Path, target: str, precision: Precision = "fp32", flags: dict[str, str] | None = None) -> Engine:
    """Raises DeviceError: the target has not that precision here."""
    backend, options = find_target(target).backend(), EngineOptions(precision=precision, flags=flags or {})
    backend.platform(target, options)
    return backend.open(Source(target, path, options), None, None)


def multiplied_in(engine: Engine) -> str:
    """What an engine of x (64, 64) × 1 rounds x to: 1 + 2⁻¹² is a number of fp32 alone, 1 + 2⁻⁹ one of fp16 too."""
    x = np.full((64, 64), 1 + 2.0**-12, np.float32)
    x[:, 0] = 1 + 2.0**-9
    found = engine.run({"x": x})["y"]
    kept = ((found[:, 1:] == x[:, 1:]).all(), (found[:, 0] == x[:, 0]).all())
    return {(True, True): "fp32", (False, True): "fp16", (False, False): "bf16"}[kept]


def main(target: str, precision: Precision) -> None:
    with tempfile.TemporaryDirectory() as directory:
        engine = open_product(
            write_product(Path(directory) / "one.onnx", 64, np.eye(64, dtype=np.float32)), target, precision
        )
        print(json.dumps([multiplied_in(engine), engine.describe()["arithmetic"]]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])  # type: ignore[arg-type]
