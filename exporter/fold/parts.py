# SPDX-License-Identifier: Apache-2.0
"""Concatenated rows of several inputs, such as a video's frames and sound, taken apart up to the products:

    softmax(q [K_1; K_2]ᵀ) [V_1; V_2]  =  P_1 V_1 + P_2 V_2   with   [P_1, P_2] = softmax([q K_1ᵀ, q K_2ᵀ])

so that each input is folded separately. Operations on single rows are applied to each part.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from perceiver_export.exporter.fold.nodes import Nodes, array_of, axis_of, is_known, operand, put, sizes
from perceiver_export.exporter.fold.slicing import Region, copy_region, cuts, places

Parts = list[ir.Value]


def split_rows(graph: ir.Graph) -> bool:
    """Take concatenated rows apart in place. Returns whether any were."""
    found = False
    for node in list(graph):
        if node.op_type != "Concat" or not is_known(node):
            continue
        rank = len(sizes(node.outputs[0]))
        axis = axis_of(node, rank, 0)
        parts = [value for value in node.inputs if value is not None]
        if 0 < axis < rank - 1 and _reaches_products(node.outputs[0], axis):
            _spread(node.outputs[0], axis, parts)
            found = True
    return found


def _reaches_products(value: ir.Value, axis: int) -> bool:
    """Whether the rows, or rows computed from each of them, are the keys or values of a product."""
    return any(
        row < 0 or (user.inputs[1] is value and row == len(sizes(user.outputs[0])) - 1)
        if _is_product(user)
        else _reaches_products(user.outputs[0], row)
        for user, row in _users(value, axis)
    )


def _users(value: ir.Value, axis: int) -> Iterator[tuple[ir.Node, int]]:
    """Nodes that treat each row by itself, with the row axis of their result; and reads, with -1."""
    for user in dict.fromkeys(value.consumers()):
        if len(user.outputs) > 1 or not is_known(user):
            continue
        if _is_product(user) and user.inputs[1] is value and axis == len(sizes(value)) - 2:
            yield user, -1
            continue
        shape = sizes(user.outputs[0])
        for row, extent in enumerate(shape):
            found = cuts(user, row) if extent == sizes(value)[axis] else None
            if found is not None and all(
                cut == axis if one is value else cut is None or array_of(one) is not None
                for one, cut in zip(user.inputs, found, strict=True)
            ):
                yield user, row
                break


def _is_product(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and not any(array_of(value) is not None for value in node.inputs)


def _spread(value: ir.Value, axis: int, parts: Parts) -> None:
    """Apply the readers of ``value`` to each part."""
    for user, row in list(_users(value, axis)):
        nodes, result = Nodes(user), user.outputs[0]
        if row < 0:
            put(result, _read(nodes, user, parts, axis))
            continue
        made = [_copied(nodes, user, value, part, row, rows) for part, rows in places(parts, axis)]
        joined = nodes.concat(made, row)
        put(result, joined)
        if not _is_product(user):
            _spread(joined, row, made)


def _copied(nodes: Nodes, node: ir.Node, value: ir.Value, part: ir.Value, row: int, rows: slice) -> ir.Value:
    """A copy of the node for one part."""

    def take(one: ir.Value, axis: int) -> ir.Value:
        return part if one is value else nodes.slice(one, axis, rows.start, rows.stop)

    alone = Region([node], {node.outputs[0]: row}, [node.outputs[0]])
    return copy_region(nodes, alone, take, lambda extent: rows.stop - rows.start)[node.outputs[0]]


def _read(nodes: Nodes, node: ir.Node, parts: Parts, axis: int) -> ir.Value:
    """Σ_i P_i V_i"""
    weights = operand(node)
    last = len(sizes(weights)) - 1
    return nodes.summed(
        nodes.matmul(nodes.slice(weights, last, rows.start, rows.stop), part) for part, rows in places(parts, axis)
    )
