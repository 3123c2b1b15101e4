# SPDX-License-Identifier: Apache-2.0
"""An engine's peak rates on this machine: matrix products by type, and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast, get_args

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.graphs import constant, remove_unused
from perceiver_export.calibration.quantization.engines import Timing, read_kernels, totals
from perceiver_export.runtimes.engines.backend import EngineOptions, Kernel, Precision
from perceiver_export.runtimes.runtime import Array

_SECONDS = 0.3  # of timing
_SIZES = (512, 1024, 2048)  # of a product's matrices: 1 to 16 MiB each in fp32
_SLOW = 50.0  # milliseconds of a product; beyond it, no larger one is timed
_ELEMENTS = 1 << 24  # of each array of a sum: 64 MiB
_CACHED = 32 << 20  # bytes that a cache may hold


class Peaks(NamedTuple):
    """``products``: FLOP/s by type; ``memory``: bytes/s. Each is the best rate measured, alone or in a layer."""

    products: dict[str, float]
    memory: float

    def milliseconds(self, flops: int, precision: str, moved: Iterable[int]) -> float:
        """The least time for the products and for the bytes that each kernel ``moved``, if no cache may hold them."""
        work = flops / self.products[precision] if precision in self.products else 0.0
        return 1e3 * max(work, _uncached(moved) / self.memory if self.memory else 0.0)

    def beside(self, flops: int, precision: str, moved: Iterable[int], milliseconds: float) -> Peaks:
        """These peaks, raised if a layer did this work in less time than they allow."""
        if not milliseconds or precision not in self.products:
            return self
        rate = max(self.products[precision], 1e3 * flops / milliseconds)
        memory = max(self.memory, 1e3 * _uncached(moved) / milliseconds)
        return Peaks({**self.products, precision: rate}, memory)


def _uncached(moved: Iterable[int]) -> int:
    return sum(one for one in moved if one > _CACHED)


def measure_peaks(target: str, precisions: tuple[str, ...], threads: int | None) -> Peaks:
    """The rates of an engine on this machine, from products of each type and a large sum."""
    products = {name: rate for name in precisions if (rate := _product(target, name, threads))}
    return Peaks(products, _memory(target, threads) if products else 0.0)


def _product(target: str, precision: str, threads: int | None) -> float:
    """FLOP/s of a product of two square matrices, at the fastest size; 0 if the engine reports no product."""
    ops: list[tuple[str, ...]] = [("MatMul", "y", "x", "w")]
    if precision == "int8":  # its activations are quantized first
        ops = [("QuantizeLinear", "q", "x", "s", "z"), ("DequantizeLinear", "d", "q", "s", "z")]
        ops += [("DequantizeLinear", "v", "w", "s"), ("MatMul", "y", "d", "v")]
    rates = []
    for size in _SIZES:
        weight = np.random.default_rng(0).integers(-127, 128, (size, size))
        array = weight.astype(np.int8 if precision == "int8" else np.float32)
        kernels = _kernels((1, size, size), ops, array, target, precision, threads)
        least = float(totals([one for one in kernels if one.product]).min())
        rates.append(2e3 * size**3 / least if least else 0.0)
        if least > _SLOW:
            break
    return max(rates)


def _memory(target: str, threads: int | None) -> float:
    """Bytes/s of the sum of two arrays that no cache holds."""
    array = np.ones(_ELEMENTS, np.float32)
    kernels = _kernels(array.shape, [("Add", "y", "x", "w")], array, target, "fp32", threads)
    least = float(totals(kernels).min())
    return 3e3 * array.nbytes / least if least else 0.0


def _kernels(
    shape: Sequence[int], ops: Iterable[Sequence[str]], weight: Array, target: str, precision: str, threads: int | None
) -> list[Kernel]:
    """The kernels of a graph of ``ops`` (type, output, inputs) with input ``x`` and constants ``w``, ``s``, ``z``."""
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=(), opset_imports={"": 20}, name="peak")
    constants = {"w": weight, "s": np.array(0.01, np.float32), "z": np.array(128, np.uint8)}
    values = {"x": x} | {name: constant(graph, name, array) for name, array in constants.items()}
    for op, output, *inputs in ops:
        values[output] = ir.Value(name=output)
        graph.append(ir.node(op, [values[name] for name in inputs], outputs=[values[output]], name=output))
    values["y"].type, values["y"].shape = x.type, x.shape
    graph.outputs.append(values["y"])
    remove_unused(graph)
    options = EngineOptions(precision=cast("Precision", precision if precision in get_args(Precision) else "fp32"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(ir.Model(graph, ir_version=10), path)
        feeds = {"x": np.ones(shape, np.float32)}
        return read_kernels(target, path, feeds, options, Timing(_SECONDS, threads))[1]
