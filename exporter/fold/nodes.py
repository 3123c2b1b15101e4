# SPDX-License-Identifier: Apache-2.0
"""Reading and making nodes of a graph whose shapes are all known."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.graphs import made_by as made_by

Shape = tuple[int, ...]
_FLOATS = (ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# These move no data; they change at most the shape.
VIEWS = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity"})
# The inputs that hold sizes or bounds, by operator.
SIZED = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Split", "TopK", "Pad", "AffineGrid"), (1,)),
    "ConstantOfShape": (0,),
    "Slice": (1, 2),
    "Resize": (3,),
}


def shape_of(value: ir.Value | None) -> Shape | None:
    """The shape, None if a dimension is unknown."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(value.shape.numpy())


def sizes(value: ir.Value) -> Shape:
    """The shape of a value that is known to have one."""
    shape = shape_of(value)
    assert shape is not None, value
    return shape


def is_known(node: ir.Node) -> bool:
    """Whether the shapes of all that a node reads and writes are known."""
    return all(shape_of(value) is not None for value in (*node.inputs, *node.outputs) if value is not None)


def is_foldable(node: ir.Node) -> bool:
    """Whether a node may be rewritten, in float32 or float64: 16 bits are too few to reorder, and integers wrap."""
    return node.outputs[0].dtype in _FLOATS[:2] and is_known(node)


def operand(node: ir.Node, index: int = 0) -> ir.Value:
    """An input that the operator requires."""
    value = node.inputs[index]
    assert value is not None, node
    return value


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be left out, None if it is."""
    return node.inputs[index] if len(node.inputs) > index else None


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer, None for any other value."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def number(value: ir.Value | None) -> float | None:
    """The number in an initializer of one element."""
    array = array_of(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def factor_of(node: ir.Node, value: ir.Value) -> float | None:
    """The number that a Mul or Div multiplies the value by; None if it is no constant."""
    if node.op_type == "Div":
        found = number(node.inputs[1]) if node.inputs[0] is value else None
        return None if not found else 1 / found
    return next((found for one in node.inputs if one is not value and (found := number(one)) is not None), None)


def integers(node: ir.Node, index: int) -> list[int] | None:
    """The integers of a constant input."""
    array = array_of(optional(node, index))
    return None if array is None else [int(one) for one in array.reshape(-1)]


def stored_sizes(node: ir.Node) -> Iterator[tuple[int, list[int]]]:
    """The constant inputs that hold sizes or bounds, by index."""
    for index in SIZED.get(node.op_type, ()):
        found = integers(node, index)
        if found is not None:
            yield index, found


def axis_of(node: ir.Node, rank: int, default: int = -1) -> int:
    """The attribute `axis`, counted from the front."""
    return node.attributes.get_int("axis", default) % rank


def over_last(node: ir.Node, default: int = -1) -> bool:
    """Whether the attribute `axis` is the last axis of the result."""
    rank = len(sizes(node.outputs[0]))
    return axis_of(node, rank, default) == rank - 1


def only_reader(value: ir.Value) -> ir.Node | None:
    """The only node that reads the value, None if several do or it is an output of the graph."""
    readers = set(value.consumers())
    return readers.pop() if len(readers) == 1 and not value.is_graph_output() else None


def exits(nodes: Collection[ir.Node]) -> list[ir.Value]:
    """The values of some nodes that others read, or that are outputs of the graph."""
    return [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(user not in nodes for user in value.consumers())
    ]


@dataclass(frozen=True)
class Sizes:
    """The sizes that dynamic dimensions count as. ``planned`` maps the prime that stands in for each to its size.

    A graph is folded with a prime in place of each dynamic dimension, so that all shapes are plain integers. A size
    that depends on the dimension is a multiple of its prime.
    """

    planned: Mapping[int, int] = field(default_factory=dict)

    def count(self, dims: Iterable[int]) -> int:
        """Elements of a tensor of these dimensions at the planned sizes."""
        return self.real(math.prod(dims))

    def real(self, number: int) -> int:
        for prime, planned in self.planned.items():
            while number and number % prime == 0:
                number = number // prime * planned
        return number

    def one(self, number: int) -> int:
        """`real`, with dynamic dimensions of one step."""
        return Sizes(dict.fromkeys(self.planned, 1)).real(number)

    def dynamic(self, number: int) -> bool:
        return any(number % prime == 0 for prime in self.planned)


class Nodes:
    """Makes nodes before ``anchor``, with shapes, in the torch module of ``origin``."""

    _names = itertools.count()

    def __init__(self, anchor: ir.Node, origin: ir.Node | None = None) -> None:
        assert anchor.graph is not None
        self.graph, self.anchor, self.origin = anchor.graph, anchor, origin or anchor
        kinds = {value.dtype for value in (*anchor.inputs, *anchor.outputs) if value is not None}
        self.dtype = next((kind for kind in _FLOATS if kind in kinds), ir.DataType.FLOAT)

    def constant(self, array: Any, role: str = "") -> ir.Value:
        """An initializer; floats get the graph's precision. ``role`` ends its name."""
        array = np.asarray(array)
        if array.dtype.kind == "f":
            array = np.ascontiguousarray(array.astype(self.dtype.numpy()))
        name = f"fold.{next(self._names)}{role}"
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.initializers.add(value)
        return value

    def make(
        self, operator: str, inputs: Sequence[ir.Value | None], shape: Iterable[int], **attributes: Any
    ) -> ir.Value:
        """The result of a new node, of the type of its first input."""
        module = (self.origin.name or "").rpartition("/")[0]
        node = ir.node(operator, inputs, attributes, name=f"{module}/fold_{next(self._names)}")
        node.metadata_props.update(self.origin.metadata_props)
        (result,) = node.outputs
        result.name = f"fold_{next(self._names)}"
        known = inputs[0].type if inputs[0] is not None else None
        result.type = ir.TensorType(self.dtype) if known is None else known
        result.shape = ir.Shape([int(size) for size in shape])
        self.graph.insert_before(self.anchor, node)
        return result

    def reshape(self, value: ir.Value, shape: Iterable[int]) -> ir.Value:
        target = tuple(int(size) for size in shape)
        if -1 in target:
            rest = math.prod(sizes(value)) // -math.prod(target)
            target = tuple(rest if size == -1 else size for size in target)
        if sizes(value) == target:
            return value
        if (array := array_of(value)) is not None:
            return self.constant(array.reshape(target))
        return self.make("Reshape", [value, self.constant(np.array(target, np.int64))], target)

    def matrix(self, value: ir.Value) -> ir.Value:
        """All rows of a value, as one matrix."""
        return self.reshape(value, (-1, sizes(value)[-1]))

    def transpose(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        if list(order) == list(range(len(order))):
            return value
        if (array := array_of(value)) is not None:
            return self.constant(array.transpose(order))
        return self.make("Transpose", [value], [sizes(value)[axis] for axis in order], perm=list(order))

    def expand(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        if sizes(value) == tuple(shape):
            return value
        return self.make("Expand", [value, self.constant(np.array(shape, np.int64))], shape)

    def binary(self, operator: str, left: ir.Value, right: ir.Value) -> ir.Value:
        return self.make(operator, [left, right], np.broadcast_shapes(sizes(left), sizes(right)))

    def summed(self, values: Iterable[ir.Value]) -> ir.Value:
        return functools.reduce(functools.partial(self.binary, "Add"), values)

    def matmul(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """A product; of two constants it is computed here, in float64."""
        one, other = array_of(left), array_of(right)
        if one is not None and other is not None:
            return self.constant(np.matmul(one.astype(np.float64), other.astype(np.float64)))
        (*lead, rows, depth), (*own, inner, columns) = sizes(left), sizes(right)
        assert depth == inner, (sizes(left), sizes(right))
        return self.make("MatMul", [left, right], (*np.broadcast_shapes(tuple(lead), tuple(own)), rows, columns))

    def sum(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        shape = [size for axis, size in enumerate(sizes(value)) if axis not in axes]
        return self.make("ReduceSum", [value, self.constant(np.array(axes, np.int64))], shape, keepdims=0)

    def mean(self, value: ir.Value) -> ir.Value:
        """The mean over the last axis, which is kept."""
        axes = self.constant(np.array([-1], np.int64))
        return self.make("ReduceMean", [value, axes], (*sizes(value)[:-1], 1), keepdims=1)

    def concat(self, values: Sequence[ir.Value], axis: int = -1) -> ir.Value:
        if len(values) == 1:
            return values[0]
        shape = list(sizes(values[0]))
        shape[axis] = sum(sizes(value)[axis] for value in values)
        return self.make("Concat", values, shape, axis=axis)

    def pad(self, value: ir.Value, pads: Sequence[int]) -> ir.Value:
        """Pad with zeros: ``pads`` has the numbers before each axis, then those after each."""
        rank = len(pads) // 2
        if not any(pads):
            return value
        shape = [pads[axis] + size + pads[rank + axis] for axis, size in enumerate(sizes(value))]
        return self.make("Pad", [value, self.constant(np.array(pads, np.int64))], shape)

    def cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        if value.dtype == kind:
            return value
        made = self.make("Cast", [value], sizes(value), to=int(kind))
        made.type = ir.TensorType(kind)
        return made

    def look_up(self, value: ir.Value, indices: ir.Value, axis: int = 0) -> ir.Value:
        """The steps of an axis at indices of any shape."""
        shape = sizes(value)
        return self.make("Gather", [value, indices], (*shape[:axis], *sizes(indices), *shape[axis + 1 :]), axis=axis)

    def slice(self, value: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
        if (array := array_of(value)) is not None:
            return self.constant(array[(slice(None),) * axis + (slice(start, stop),)])
        shape = list(sizes(value))
        shape[axis] = stop - start
        bounds = (self.constant(np.array([bound], np.int64)) for bound in (start, stop, axis))
        return self.make("Slice", [value, *bounds], shape)


def put(value: ir.Value, new: ir.Value) -> None:
    """Replace ``value`` with ``new``, which takes its name if it is an output of the graph."""
    if value.is_graph_output():
        name, value.name = value.name, f"{value.name}.unfolded"
        value.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = name
    else:
        value.replace_all_uses_with(new)
