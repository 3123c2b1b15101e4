# SPDX-License-Identifier: Apache-2.0
"""Regions of nodes that treat one axis row by row (latents, heads, queries), and copies of them for some rows.

Rows of a softmax do not depend on each other. The region around it is everything that can be computed for some of its
rows alone: in pieces it gives the same result in less memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from perceiver_export.exporter.fold.nodes import VIEWS, Nodes, Shape, axis_of, exits, integers, is_known, sizes

_NAMES = (
    "Abs Add And Cast Ceil Clip Cos Div Dropout Elu Equal Erf Exp Expand Floor Gelu Greater GreaterOrEqual HardSigmoid",
    "HardSwish Identity IsNaN LeakyRelu Less LessOrEqual Log Max Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu",
    "Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Tanh Where Xor",
)
ELEMENTWISE = frozenset(" ".join(_NAMES).split())
_MOST_GROWN = 60  # nodes after a region that are tried to merge its results into one
# The axis of each input that is cut where the result is cut; None: all of that input is needed.
Cuts = list[int | None]


def cuts(node: ir.Node, axis: int) -> Cuts | None:
    """Where the inputs of a node are cut if its result is cut at ``axis``; None if it cannot be."""
    rule = _RULES.get(node.op_type)
    return None if rule is None or not is_known(node) else rule(node, axis)


def _shapes(node: ir.Node) -> list[Shape]:
    return [() if value is None else sizes(value) for value in node.inputs]


def _first(node: ir.Node, axis: int | None) -> Cuts | None:
    """The first input is cut; the others are parameters."""
    return None if axis is None else [axis, *[None] * (len(node.inputs) - 1)]


def _broadcast(shape: Shape, rank: int, axis: int) -> int | None:
    """The axis at which an operand is cut that is broadcast to ``rank`` axes; None if it is repeated there."""
    own = axis - (rank - len(shape))
    return own if own >= 0 and shape[own] > 1 else None


def _elementwise(node: ir.Node, axis: int) -> Cuts:
    rank = len(sizes(node.outputs[0]))
    return [_broadcast(shape, rank, axis) for shape in _shapes(node)]


def _expand(node: ir.Node, axis: int) -> Cuts:
    return [_elementwise(node, axis)[0], None]


def _but_own_axis(node: ir.Node, axis: int) -> Cuts | None:
    rank = len(sizes(node.outputs[0]))
    return None if axis_of(node, rank) == axis else _first(node, axis)


def _before_norm(node: ir.Node, axis: int) -> Cuts | None:
    return _first(node, axis) if axis < axis_of(node, len(sizes(node.outputs[0]))) else None


def _matmul(node: ir.Node, axis: int) -> Cuts:
    left, right = _shapes(node)
    rank = len(sizes(node.outputs[0]))
    if axis == rank - 1:
        return [None, len(right) - 1]
    if axis == rank - 2:
        return [len(left) - 2, None]
    return [_broadcast(shape, rank, axis) for shape in (left, right)]


def _view(node: ir.Node, axis: int) -> Cuts | None:
    return _first(node, _same_place(sizes(node.outputs[0]), _shapes(node)[0], axis))


def _same_place(shape: Shape, other: Shape, axis: int) -> int | None:
    """The axis of ``other`` whose outer part is the outer part of an axis of ``shape``, in row-major order."""
    before, passed = math.prod(shape[:axis]), 1
    for place, extent in enumerate(other):
        if passed == before and extent > 1:
            return place if shape[axis] % extent == 0 or extent % shape[axis] == 0 else None
        passed *= extent
        if passed > before:
            break
    return None


def _transpose(node: ir.Node, axis: int) -> Cuts:
    rank = len(sizes(node.outputs[0]))
    return [node.attributes.get_ints("perm", tuple(range(rank))[::-1])[axis]]


def _reduction(node: ir.Node, axis: int) -> Cuts | None:
    rank, axes = len(_shapes(node)[0]), integers(node, 1)
    if axes is None:
        return None
    gone = [one % rank for one in axes]
    kept = range(rank) if node.attributes.get_int("keepdims", 1) else [one for one in range(rank) if one not in gone]
    return None if kept[axis] in gone else _first(node, kept[axis])


def _concat(node: ir.Node, axis: int) -> Cuts | None:
    return None if axis_of(node, len(sizes(node.outputs[0])), 0) == axis else [axis] * len(node.inputs)


def _slice(node: ir.Node, axis: int) -> Cuts | None:
    rank, axes = len(sizes(node.outputs[0])), integers(node, 3)
    return None if axes is None or axis in [one % rank for one in axes] else _first(node, axis)


def _gather(node: ir.Node, axis: int) -> Cuts | None:
    data, indices = _shapes(node)
    over = axis_of(node, len(data), 0)
    if over <= axis < over + len(indices):
        return [None, axis - over]
    return [axis if axis < over else axis - len(indices) + 1, None]


def _gather_nd(node: ir.Node, axis: int) -> Cuts | None:
    _, indices = _shapes(node)
    batched = node.attributes.get_int("batch_dims", 0)
    return [None, axis] if batched <= axis < len(indices) - 1 else None


_RULES: dict[str, Callable[[ir.Node, int], Cuts | None]] = {
    **dict.fromkeys(sorted(ELEMENTWISE), _elementwise),
    "Expand": _expand,
    **dict.fromkeys(("Softmax", "LogSoftmax"), _but_own_axis),
    "LayerNormalization": _before_norm,
    "MatMul": _matmul,
    **dict.fromkeys(sorted(VIEWS - {"Identity"}), _view),
    "Transpose": _transpose,
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax"), _reduction),
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
}


@dataclass
class Region:
    """Nodes in the graph's order, the axis at which each value that they read or make is cut, and their results."""

    nodes: list[ir.Node]
    axes: dict[ir.Value, int]
    results: list[ir.Value]

    @property
    def inside(self) -> set[ir.Value]:
        return {value for node in self.nodes for value in node.outputs}

    @property
    def steps(self) -> int:
        """The number of equal parts into which the axis can be cut."""
        return math.gcd(*(sizes(value)[axis] for value, axis in self.axes.items()))


def region_of(softmax: ir.Node, axis: int, least: int) -> Region | None:
    """The region around a softmax that is cut at an axis; None if a node needs the whole axis.

    Nodes before the softmax belong to it if they make at least ``least`` numbers, nodes after it if they are views or
    read more than ``least`` numbers of it.
    """
    return _Growing(softmax, axis, least).grown()


class _Growing:
    def __init__(self, softmax: ir.Node, axis: int, least: int) -> None:
        assert softmax.graph is not None
        self.softmax, self.least = softmax, least
        self.graph, self.listed = softmax.graph, list(softmax.graph)
        at = self.listed.index(softmax)
        self.before, self.behind = self.listed[:at], self.listed[at:]
        self.nodes: set[ir.Node] = set()
        self.axes: dict[ir.Value, int] = {softmax.outputs[0]: axis}

    def grown(self) -> Region | None:
        if not self._backward():
            return None
        for node in self.behind:
            if any(node.op_type in VIEWS or math.prod(sizes(value)) > self.least for value in self._read(node)):
                self._take(node)
        self._meet()
        region = Region([node for node in self.listed if node in self.nodes], self.axes, self._results())
        return region if self._sound(region) else None

    def _backward(self) -> bool:
        """Add the nodes that compute only for the softmax; False if it cannot be cut."""
        found = cuts(self.softmax, self.axes[self.softmax.outputs[0]])
        if found is None:
            return False
        self.nodes.add(self.softmax)
        self._cut(self.softmax, found)
        for node in reversed(self.before):
            result = node.outputs[0]
            found = cuts(node, self.axes[result]) if result in self.axes and len(node.outputs) == 1 else None
            if found is None or math.prod(sizes(result)) < self.least:
                continue  # a slice of it costs less than a product in pieces
            if result.is_graph_output() or any(user not in self.nodes for user in result.consumers()):
                continue
            self.nodes.add(node)
            if not self._cut(node, found):
                return False
        return True

    def _cut(self, node: ir.Node, found: Cuts) -> bool:
        """Note where a node's inputs are cut; False if one would be cut at two axes."""
        pairs = zip(node.inputs, found, strict=True)
        wanted = [(value, axis) for value, axis in pairs if value is not None and axis is not None]
        if any(self.axes.get(value, axis) != axis for value, axis in wanted):
            return False
        self.axes.update(wanted)
        return True

    def _read(self, node: ir.Node) -> list[ir.Value]:
        """The values of the region that a node outside reads."""
        if node in self.nodes:
            return []
        return [value for value in node.inputs if value is not None and value.producer() in self.nodes]

    def _take(self, node: ir.Node) -> bool:
        """Add a node after the region, if its result can be cut like the values that it reads."""
        read = self._read(node)
        if not read or len(node.outputs) > 1 or not is_known(node):
            return False
        for axis, extent in enumerate(sizes(node.outputs[0])):
            found = cuts(node, axis) if extent > 1 else None
            if found is None:
                continue
            own = dict(zip(node.inputs, found, strict=True))
            if all(own[value] == self.axes[value] for value in read) and self._cut(node, found):
                self.nodes.add(node)
                self.axes[node.outputs[0]] = axis
                return True
        return False

    def _results(self) -> list[ir.Value]:
        return exits({node: None for node in self.listed if node in self.nodes})

    def _meet(self) -> None:
        """Grow to where the results meet: several keep the softmax of every piece alive until the last is read."""
        if len(self._results()) < 2:
            return
        state, tried = (set(self.nodes), dict(self.axes)), 0
        for node in self.behind:
            if not self._read(node):
                continue
            tried += 1
            if tried > _MOST_GROWN:
                break
            if self._take(node) and len(self._results()) == 1:
                return
        self.nodes, self.axes = state

    def _sound(self, region: Region) -> bool:
        """Whether no node of the region needs a value of it whole, directly or through nodes outside."""
        inside = region.inside
        for node in region.nodes:
            found = cuts(node, self.axes[node.outputs[0]])
            assert found is not None
            pairs = zip(node.inputs, found, strict=True)
            if any(value in inside and axis != self.axes[value] for value, axis in pairs if value is not None):
                return False
        depending = dependent(self.graph, inside) - inside
        return not any(value in depending for node in region.nodes for value in node.inputs)


def dependent(graph: ir.Graph, values: Iterable[ir.Value]) -> set[ir.Value]:
    """The values, and all values that depend on their numbers."""
    found = set(values)
    for node in graph:
        if node.op_type not in ("Shape", "Size") and any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def upstream(values: Iterable[ir.Value], stop: ir.Value | None = None) -> Iterator[ir.Value]:
    """The values, and all that they are computed from, but nothing upstream of ``stop``."""
    found, left = set[ir.Value](), list(values)
    while left:
        value = left.pop()
        if value in found:
            continue
        found.add(value)
        yield value
        node = value.producer()
        if node is not None and value is not stop:
            left += [one for one in node.inputs if one is not None]


def copy_region(
    nodes: Nodes, region: Region, take: Callable[[ir.Value, int], ir.Value], extent: Callable[[int], int]
) -> dict[ir.Value, ir.Value]:
    """Copy the region for some rows: ``take`` selects those of an outside value, ``extent`` resizes an axis."""
    made: dict[ir.Value, ir.Value] = {}
    for node in region.nodes:
        result = node.outputs[0]
        axis = region.axes[result]
        found = cuts(node, axis)
        assert found is not None
        shape = list(sizes(result))
        shape[axis] = extent(shape[axis])
        inputs: list[ir.Value | None] = []
        for value, cut in zip(node.inputs, found, strict=True):
            if value in made:
                inputs.append(made[value])
            else:
                inputs.append(value if value is None or cut is None else take(value, cut))
        nodes.origin = node
        if node.op_type in VIEWS and inputs[0] is not None:
            made[result] = nodes.reshape(inputs[0], shape)
        else:
            if node.op_type == "Expand":
                inputs[1] = nodes.constant(shape)
            attributes = {name: one.value for name, one in node.attributes.items()}
            made[result] = nodes.make(node.op_type, inputs, shape, **attributes)
            made[result].type = result.type
    return made


def places(parts: Iterable[ir.Value], axis: int) -> Iterator[tuple[ir.Value, slice]]:
    """Each part, and its rows among those of all parts."""
    start = 0
    for part in parts:
        stop = start + sizes(part)[axis]
        yield part, slice(start, stop)
        start = stop
