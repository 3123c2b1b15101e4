# SPDX-License-Identifier: Apache-2.0
"""Which regions are computed in pieces so that activations stay within a budget, and the expected peak.

An engine runs the nodes in order, and an array lives from the node that makes it to the last that reads it. The peak
is the most that lives at once. Scores count twice, because one array is read to write the next.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import onnx_ir as ir
import onnx_ir.passes.common as common

from perceiver_export.exporter.fold.nodes import VIEWS, Nodes, Sizes, array_of, axis_of, put, shape_of, sizes
from perceiver_export.exporter.fold.slicing import Region, copy_region, region_of
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.manifest import MemoryPlan, PlannedStage

# Bytes of a piece. Larger ones are no faster if products have `_LEAST_ROWS` rows; with fewer, packing the other operand
# for each piece, which may be all inputs, costs too much.
_PIECE = 64 << 20
_LEAST_ROWS = 128
_SMALLEST, _MOST_PIECES = 1 << 16, 512  # more pieces would make a graph of many thousand nodes
_MIB = 1 << 20
_SCORES = 2
_FOLLOWED = 16  # a region goes on while values have 1/16 of the softmax's size


def plan(model: ir.Model, budget: int, real: Sizes) -> tuple[ir.Model, MemoryPlan]:
    """The model with large regions cut into pieces: the fastest, or smaller ones if the budget (bytes) requires them.
    Raises UsageError if even the smallest pieces need more.
    """
    least, limit = None, budget
    while True:
        planned = model.clone()
        stages = in_pieces(planned, limit, real)
        found = peak(planned.graph, real)
        if found <= budget:
            return planned, MemoryPlan(budget, found, stages)
        least = found if least is None else min(found, least)
        if limit == 0:
            needed = -(-least // _MIB)
            raise UsageError(
                f"the model needs at least {needed} MiB of activations, the budget is {budget / _MIB:,.4g} MiB",
                f"give --memory-budget {needed}MiB or more",
            )
        limit = limit // 4 if limit > _SMALLEST else 0


def in_pieces(model: ir.Model, limit: int, real: Sizes) -> tuple[PlannedStage, ...]:
    """Cut regions larger than the fastest pieces, or than ``limit`` bytes, in place."""
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    stages = [stage for softmax in softmaxes if (stage := _cut(softmax, limit, real)) is not None]
    common.RemoveUnusedNodesPass()(model)
    model.graph.sort()
    return tuple(stages)


def _cut(softmax: ir.Node, budget: int, real: Sizes) -> PlannedStage | None:
    """Cut the region around a softmax into pieces; None if it is small, or cannot be cut."""
    if _SCORES * _bytes(softmax.outputs[0], real) <= min(budget, _PIECE):
        return None
    shape = sizes(softmax.outputs[0])
    over = axis_of(softmax, len(shape))
    for axis, extent in enumerate(shape):
        if axis == over or extent == 1 or real.dynamic(extent):
            continue
        region = region_of(softmax, axis, math.prod(shape) // _FOLLOWED)
        if region is None:
            continue
        heads = axis < len(shape) - 2
        least = 1 if heads else -(-_LEAST_ROWS * region.steps // extent)
        size = _piece_size(region, budget, least, real)
        if size < region.steps:
            _write(region, size)
            unit = "heads" if heads else "rows"
            at_once = size * (extent // region.steps)
            largest = _largest(region, real)
            return PlannedStage(softmax.name or "", unit, at_once, extent, _SCORES * largest * size // region.steps)
    return None


def _piece_size(region: Region, budget: int, least: int, real: Sizes) -> int:
    """Steps of the axis per piece, as equal as possible; fewer than ``least`` only if the budget requires it."""
    steps, each = region.steps, _SCORES * _largest(region, real) // region.steps
    at_once = max(min(max(_PIECE // each, least), budget // each, steps), steps // _MOST_PIECES)
    return -(-steps // max(-(-steps // max(at_once, 1)), 1))


def _largest(region: Region, real: Sizes) -> int:
    return max(_bytes(value, real) for value in region.inside)


def _write(region: Region, size: int) -> None:
    nodes, steps = Nodes(region.nodes[-1]), region.steps
    pieces = [_piece(nodes, region, start, min(start + size, steps)) for start in range(0, steps, size)]
    for value in region.results:
        put(value, nodes.concat([made[value] for made in pieces], region.axes[value]))


def _piece(nodes: Nodes, region: Region, start: int, stop: int) -> dict[ir.Value, ir.Value]:
    """The region for some steps of its axis."""
    steps = region.steps

    @functools.cache
    def take(value: ir.Value, axis: int) -> ir.Value:
        each = sizes(value)[axis] // steps
        return nodes.slice(value, axis, start * each, stop * each)

    return copy_region(nodes, region, take, lambda extent: extent // steps * (stop - start))


def peak(graph: ir.Graph, real: Sizes) -> int:
    """The most bytes of activations that live at once."""
    return max(_live(graph, real), default=0)


def _live(graph: ir.Graph, real: Sizes) -> Iterator[int]:
    """Bytes at each node: its inputs and results, and values that are read later. A view is the array that it shows."""
    shown: dict[ir.Value, ir.Value] = {}
    last: dict[ir.Value, int] = {}
    nodes = list(graph)
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None:
                last[shown.get(value, value)] = index
        if node.op_type in VIEWS and node.inputs[0] is not None:
            shown[node.outputs[0]] = shown.get(node.inputs[0], node.inputs[0])
    last |= {shown.get(value, value): len(nodes) for value in (*graph.outputs, *graph.inputs)}
    live = {value: _bytes(value, real) for value in graph.inputs}
    for index, node in enumerate(nodes):
        live |= {value: _bytes(value, real) for value in node.outputs if value not in shown}
        yield sum(live.values())
        for value in [value for value in live if last.get(value, index) <= index]:
            del live[value]


def _bytes(value: ir.Value, real: Sizes) -> int:
    shape = shape_of(value)
    if shape is None or array_of(value) is not None or value.dtype is None:
        return 0
    return int(real.count(shape) * value.dtype.itemsize)
