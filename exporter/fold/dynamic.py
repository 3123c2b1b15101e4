# SPDX-License-Identifier: Apache-2.0
"""Dynamic dimensions: each is folded with a prime number in its place, and made dynamic again afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from perceiver_export.exporter.fold.nodes import Nodes, integers, shape_of, sizes, stored_sizes
from perceiver_export.runtimes.errors import UnsupportedModelError

# Larger than most sizes, so that few others are multiples of them; much larger ones for models with hundreds of sizes.
_PRIMES = (
    *(251, 257, 263, 269, 271, 277, 281, 283, 293, 307, 311, 313, 317, 331, 337, 347, 349, 353, 359, 367),
    *(1009, 2003, 4001, 8009),
)

_END = np.iinfo(np.int64).max  # as the end of a slice: that of the axis


def stand_ins(names: Sequence[str], taken: Iterable[int]) -> dict[str, int]:
    """A prime for each name, none of which divides a size that is taken."""
    sizes_taken = set(taken) - {0, _END}
    free = [prime for prime in _PRIMES if all(size % prime for size in sizes_taken)]
    if len(free) < len(names):
        raise UnsupportedModelError(
            "the model has too many different sizes to trace a dynamic batch", "give one number as --batch"
        )
    return dict(zip(names, free, strict=False))


def _factored(size: int, primes: Mapping[str, int]) -> tuple[str, int] | None:
    """A size as (name, factor), None if it is not dynamic."""
    for name, prime in primes.items():
        if size and size != _END and size % prime == 0:
            return name, size // prime
    return None


def _dim(size: int, primes: Mapping[str, int]) -> int | ir.SymbolicDim:
    found = _factored(size, primes)
    if found is None:
        return size
    name, factor = found
    return ir.SymbolicDim(name if factor == 1 else f"{factor}*{name}")


def make_dynamic(model: ir.Model, primes: Mapping[str, int]) -> None:
    """Replace the primes with the named dimensions, in shapes and in the nodes that compute with them.

    Raises UnsupportedModelError if a dynamic size has become part of a constant.
    """
    graph = model.graph
    for node in list(graph):
        for index, found in stored_sizes(node):
            if any(_factored(size, primes) for size in found):
                known = shape_of(node.outputs[0]) if node.op_type == "Reshape" else None  # without its -1 and 0
                node.replace_input_with(index, _sizes(node, index, list(known or found), primes))
    for value in (*graph.inputs, *(result for node in graph for result in node.outputs)):
        shape = shape_of(value)
        if shape is not None:
            value.shape = ir.Shape([_dim(size, primes) for size in shape])
    for constant in graph.initializers.values():
        if constant.uses() and any(_factored(size, primes) for size in shape_of(constant) or ()):
            reader = next(iter(constant.consumers())).name
            raise UnsupportedModelError(
                f"{reader} reads a constant with a number for each sample, such as torch.arange(x.shape[0])",
                "give one number as --batch; or select from each sample with gather or take_along_dim",
            )


def _sizes(node: ir.Node, index: int, wanted: list[int], primes: Mapping[str, int]) -> ir.Value:
    """The value of input ``index`` that gives ``wanted`` at run time; a Reshape infers one size by itself."""
    nodes = Nodes(node)
    found = [_factored(size, primes) for size in wanted]
    if node.op_type == "Reshape" and sum(one is not None for one in found) == 1:
        inferred = [-1 if one else size for size, one in zip(wanted, found, strict=True)]
        return nodes.constant(np.array(inferred, np.int64))
    if node.op_type == "Slice" and index == 2 and (shape := shape_of(node.inputs[0])) is not None:
        axes = integers(node, 3) or range(len(wanted))
        to_end = [size == shape[axis] for size, axis in zip(wanted, axes, strict=True)]
        if all(end or one is None for end, one in zip(to_end, found, strict=True)):
            ends = [_END if end and one else size for size, end, one in zip(wanted, to_end, found, strict=True)]
            return nodes.constant(np.array(ends, np.int64))
    parts = [_size(nodes, size, primes) for size in wanted]
    return nodes.make("Concat", parts, (len(parts),), axis=0)


def _size(nodes: Nodes, size: int, primes: Mapping[str, int]) -> ir.Value:
    found = _factored(size, primes)
    if found is None:
        return nodes.constant(np.array([size], np.int64))
    name, factor = found
    places = ((value, axis) for value in nodes.graph.inputs for axis in range(len(sizes(value))))
    value, axis = next((value, axis) for value, axis in places if sizes(value)[axis] == primes[name])
    read = nodes.make("Shape", [value], (1,), start=axis, end=axis + 1)
    read.type = ir.TensorType(ir.DataType.INT64)
    return read if factor == 1 else nodes.binary("Mul", read, nodes.constant(np.array([factor], np.int64)))
