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
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    initializers = [numpy_helper.from_array(weight, "weight")]
    nodes = [helper.make_node("MatMul", ["x", "weight" if scale is None else "floats"], ["y"])]
    if scale is not None:
        initializers.append(numpy_helper.from_array(scale, "scale"))
        nodes.insert(0, helper.make_node("DequantizeLinear", ["weight", "scale"], ["floats"], axis=1))
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, weight.shape[1]])],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_chain(path: Path, rows: int, weight: Array, transposed: tuple[bool, ...]) -> Path:
    """x (rows, N) -> y: products with one weight (N, N), as it is or ``transposed``, each with a tanh."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = []
    for layer, swapped in enumerate(transposed):
        ends = f"x{layer}" if layer else "x", "y" if layer + 1 == len(transposed) else f"x{layer + 1}"
        nodes.append(helper.make_node("Gemm", [ends[0], "w"], [f"m{layer}"], transB=1) if swapped else
                     helper.make_node("MatMul", [ends[0], "w"], [f"m{layer}"]))  # fmt: skip
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [ends[1]]))
    given, found = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, len(weight)]) for name in "xy")
    graph = helper.make_graph(nodes, "chain", [given], [found], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


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
