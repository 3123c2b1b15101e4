# SPDX-License-Identifier: Apache-2.0
"""Where each element of a reshaped, transposed, split, sliced or scaled tensor comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from perceiver_export.exporter.fold.nodes import Shape, array_of, axis_of, factor_of, integers, operand, shape_of, sizes

# An axis is a list of atoms (extent, stride), the outermost first; a stride counts elements of the flat source.
Atom = tuple[int, int]
Axis = list[Atom]


@dataclass(frozen=True)
class Layout:
    """Element (i_0, i_1, …) of a tensor is ``scale`` times the source's at ``offset`` + the sum of its atoms."""

    source: ir.Value
    axes: list[Axis]
    offset: int = 0
    scale: float = 1.0

    @property
    def flat(self) -> list[Axis]:
        """The axes merged into one of rows and one of columns."""
        *lead, last = self.axes
        return [joined([atom for axis in lead for atom in axis]), joined(last)]


def layout_of(value: ir.Value) -> Layout:
    """The layout through all views and multiplications by one number; of any other tensor, itself."""
    shape, node = sizes(value), value.producer()
    itself = Layout(value, row_major(shape))
    if node is None or not node.inputs or shape_of(node.inputs[0]) is None:
        return itself
    if node.op_type in ("Mul", "Div"):
        return _scaled(node, shape) or itself
    step = _STEPS.get(node.op_type)
    if step is None:
        return itself
    source = layout_of(operand(node))
    found = step(node, value, source.axes)
    if found is None:
        return itself
    axes, offset = found
    return replace(source, axes=axes, offset=source.offset + offset)


def _scaled(node: ir.Node, shape: Shape) -> Layout | None:
    for value in node.inputs:
        if value is not None and shape_of(value) == shape and (factor := factor_of(node, value)) is not None:
            found = layout_of(value)
            return replace(found, scale=found.scale * factor)
    return None


def row_major(shape: Shape) -> list[Axis]:
    """The axes of a tensor in its own memory order."""
    axes: list[Axis] = []
    stride = 1
    for extent in reversed(shape):
        axes.append([(extent, stride)] if extent > 1 else [])
        stride *= extent
    return axes[::-1]


_Found = tuple[list[Axis], int] | None


def _reshaped(node: ir.Node, value: ir.Value, axes: list[Axis]) -> _Found:
    """Split and join atoms to make the new extents; None if rows and columns would mix."""
    left = [atom for axis in axes for atom in axis][::-1]
    made: list[Axis] = []
    for target in sizes(value):
        own: Axis = []
        while target > 1:
            if not left:
                return None
            extent, stride = left.pop()
            if target % extent and extent % target:
                return None
            taken = min(extent, target)
            if taken < extent:
                left.append((extent // taken, stride))
                own.append((taken, stride * (extent // taken)))
                # The outer part belongs to this axis, the inner one is left for the next.
            else:
                own.append((extent, stride))
            target //= taken
        made.append(joined(own))
    return None if left else (made, 0)


def joined(axis: Axis) -> Axis:
    """Join neighboring atoms that are one run of the source."""
    joined: Axis = []
    for extent, stride in axis:
        if joined and joined[-1][1] == extent * stride:
            joined[-1] = (joined[-1][0] * extent, stride)
        else:
            joined.append((extent, stride))
    return joined


def _transposed(node: ir.Node, value: ir.Value, axes: list[Axis]) -> _Found:
    order = node.attributes.get_ints("perm", tuple(range(len(axes)))[::-1])
    return [axes[axis] for axis in order], 0


def _expanded(node: ir.Node, value: ir.Value, axes: list[Axis]) -> _Found:
    shape = sizes(value)
    missing = len(shape) - len(axes)
    before = (1,) * missing + sizes(operand(node))
    padded: list[Axis] = [[]] * missing + axes
    pairs = zip(padded, before, shape, strict=True)
    return [[(extent, 0)] if old == 1 and extent > 1 else axis for axis, old, extent in pairs], 0


def _split(node: ir.Node, value: ir.Value, axes: list[Axis]) -> _Found:
    axis = axis_of(node, len(axes), 0)
    before = node.outputs[: list(node.outputs).index(value)]
    return _cut_one(axes, axis, sum(sizes(one)[axis] for one in before), sizes(value)[axis])


def _sliced(node: ir.Node, value: ir.Value, axes: list[Axis]) -> _Found:
    starts, named, steps = (integers(node, index) for index in (1, 3, 4))
    computed = any(value is not None and array_of(value) is None for value in node.inputs[3:])
    if starts is None or computed or any(step != 1 for step in steps or ()):
        return None
    offset, before = 0, sizes(operand(node))
    for axis, start in zip(named or range(len(starts)), starts, strict=True):
        axis %= len(axes)
        extent = before[axis]
        found = _cut_one(axes, axis, max(start + extent, 0) if start < 0 else min(start, extent), sizes(value)[axis])
        if found is None:
            return None
        axes, offset = found[0], offset + found[1]
    return axes, offset


def _gathered(node: ir.Node, value: ir.Value, axes: list[Axis]) -> _Found:
    """One index of an axis, which is removed."""
    index = array_of(node.inputs[1])
    if index is None or index.ndim > 0:
        return None
    axis = axis_of(node, len(axes), 0)
    found = _cut_one(axes, axis, int(index) % sizes(operand(node))[axis], 1)
    return None if found is None else ([*found[0][:axis], *found[0][axis + 1 :]], found[1])


def _cut_one(axes: list[Axis], axis: int, start: int, count: int) -> _Found:
    found = _cut(axes[axis], start, count)
    return None if found is None else ([*axes[:axis], found[0], *axes[axis + 1 :]], found[1])


def _cut(axis: Axis, start: int, count: int) -> tuple[Axis, int] | None:
    """Steps ``start`` to ``start + count`` of an axis; None if they are not a product of atoms."""
    if not axis:
        return [], 0
    (_, stride), *rest = axis
    inner = extent(rest)
    if start % inner == 0 and count % inner == 0:
        own: Axis = [(count // inner, stride)] if count > inner else []
        return own + rest, start // inner * stride
    if rest and start // inner == (start + count - 1) // inner:  # within one step of the outermost
        found = _cut(rest, start % inner, count)
        return None if found is None else (found[0], found[1] + start // inner * stride)
    return None


_STEPS = {
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout"), _reshaped),
    "Transpose": _transposed,
    "Expand": _expanded,
    "Split": _split,
    "Slice": _sliced,
    "Gather": _gathered,
}


def extent(atoms: Sequence[Atom]) -> int:
    """The number of steps of an axis."""
    return math.prod(size for size, _ in atoms)
