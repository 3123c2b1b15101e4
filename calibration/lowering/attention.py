# SPDX-License-Identifier: Apache-2.0
"""Find attention, softmax(QKᵀ + mask)V, in a graph, and pad its heads to widths for which engines have one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.graphs import array_of, constant, dims, is_constant

# Widths of heads that TensorRT's attention kernels support (measured on TensorRT for RTX 1.7: 9 to 255, with queries
# and keys as wide as values). Others run as three kernels with the scores in memory.
SMALLEST_HEAD, LARGEST_HEAD = 9, 255
_BETWEEN = frozenset({"Add", "Mul", "Div", "Cast"})  # between a product and its softmax: mask and scale


@dataclass(frozen=True)
class Attention:
    """One attention: ``scores`` = MatMul(queries, keys), ``softmax``, ``read`` = MatMul(softmax, values).

    ``qk`` and ``v`` are the widths of its heads, ``rows`` is the number of queries; None if dynamic.
    """

    scores: ir.Node
    softmax: ir.Node
    read: ir.Node
    qk: int | None
    v: int | None
    rows: int | None = None

    @property
    def fits(self) -> bool:
        """Whether an engine has a kernel for heads this wide. A single query needs none: it is a vector product."""
        return self.rows != 1 and self.qk is not None and self.qk == self.v and SMALLEST_HEAD <= self.qk <= LARGEST_HEAD

    @property
    def padded(self) -> int | None:
        """The width at which it would fit when padded with zeros; None if it fits unpadded or is too wide."""
        if self.fits or self.rows == 1 or self.qk is None or self.v is None:
            return None
        # Kernels exist for multiples of 8.
        width = max(-(-max(self.qk, self.v) // 8) * 8, 16)
        return width if width <= LARGEST_HEAD else None


def find_attentions(graph: ir.Graph) -> Iterator[Attention]:
    """Every softmax between two products of activations."""
    for node in graph:
        if node.op_type != "Softmax":
            continue
        scores, read = _product_before(node.inputs[0]), _product_after(node.outputs[0])
        if scores is not None and read is not None:
            qk, v, rows = _size(scores.inputs[0], -1), _size(read.inputs[1], -1), _size(scores.outputs[0], -2)
            yield Attention(scores, node, read, qk, v, rows)


def pad_heads(model: ir.Model) -> int:
    """Pad the heads of every attention to one width where needed, in place. Returns the number of changed attentions.

    The outputs do not change: zeros added to queries and keys add nothing to a score, and zeros added to values are cut
    off again.

    Given:  MatMul(q[8, N, 32], kᵀ[8, 32, M]) -> Softmax -> MatMul(., v[8, M, 160])
    Result: MatMul(Pad(q)[8, N, 160], Pad(kᵀ)[8, 160, M]) -> Softmax -> MatMul(., v[8, M, 160])
    """
    changed = [(one, width) for one in find_attentions(model.graph) if (width := one.padded)]
    for attention, width in changed:
        _pad(model.graph, attention.scores, 0, -1, width)
        _pad(model.graph, attention.scores, 1, -2, width)
        _pad(model.graph, attention.read, 1, -1, width)
        if attention.v is not None and width > attention.v:
            _cut(model.graph, attention.read, attention.v)
    return len(changed)


def _product_before(value: ir.Value | None) -> ir.Node | None:
    """The MatMul that computes the scores, before mask and scale."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _BETWEEN:
        rank = _rank(node.outputs[0])
        made = (one.producer() for one in node.inputs if one is not None and _rank(one) == rank)
        node = next((one for one in made if one is not None and one.op_type in {"MatMul", *_BETWEEN}), None)
    return node if node is not None and node.op_type == "MatMul" else None


def _product_after(value: ir.Value) -> ir.Node | None:
    """The MatMul that reads the probabilities, if it is their only reader."""
    users = list(value.consumers())
    while len(users) == 1 and users[0].op_type == "Cast":
        users = list(users[0].outputs[0].consumers())
    node = users[0] if len(users) == 1 else None
    return node if node is not None and node.op_type == "MatMul" and node.inputs[1] is not value else None


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else -1


def _size(value: ir.Value | None, axis: int) -> int | None:
    """The size of an axis; None if it is dynamic or missing."""
    size = value.shape[axis] if value is not None and value.shape and len(value.shape) >= -axis else None
    return size if isinstance(size, int) else None


def _pad(graph: ir.Graph, node: ir.Node, index: int, axis: int, width: int) -> None:
    """Pad one axis of an input with zeros at its end. Constants are padded right away."""
    value = node.inputs[index]
    assert value is not None
    sizes = dims(value)
    if sizes[axis] == width:
        return
    pads = np.zeros((2, len(sizes)), np.int64)
    pads[1, axis] = width - sizes[axis]
    name = f"{value.name}.padded_{node.name}"
    if is_constant(value):
        padded = constant(graph, name, np.pad(array_of(value), pads.T))
    else:
        shape = list(value.shape or ())
        shape[axis] = width
        padded = ir.Value(name=name, shape=ir.Shape(shape), type=value.type)
        amounts = constant(graph, f"{name}.pads", pads.reshape(-1))
        made = ir.node("Pad", [value, amounts], outputs=[padded], name=f"{node.name}/Pad_{index}")
        graph.insert_before(node, made)
    node.replace_input_with(index, padded)


def _cut(graph: ir.Graph, node: ir.Node, width: int) -> None:
    """Cut the last axis of a node's result to its first ``width`` values, under the same name."""
    wide, padded = node.outputs[0], node.inputs[1]
    assert wide.shape is not None
    bounds = [
        constant(graph, f"attention.cut.{what}_{number}", np.array([number], np.int64))
        for what, number in (("start", 0), ("end", width), ("axis", len(wide.shape) - 1))
    ]
    narrow = ir.Value(name=wide.name, type=wide.type, shape=wide.shape)
    wide.replace_all_uses_with(narrow, replace_graph_outputs=True)
    wide.name, wide.shape = f"{wide.name}.wide", ir.Shape([*wide.shape[:-1], dims(padded)[-1]])
    graph.insert_after(node, ir.node("Slice", [wide, *bounds], outputs=[narrow], name=f"{node.name}/Slice"))
