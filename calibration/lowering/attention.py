# SPDX-License-Identifier: Apache-2.0
"""Where a graph has attention, softmax(QKᵀ + mask)V, and heads of widths that engines have one kernel for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

# Widths of heads that TensorRT's attention kernels take (measured on TensorRT for RTX 1.7: 9 to 255, query and key as
# wide as value); others run as three kernels with the scores in memory.
SMALLEST_HEAD, LARGEST_HEAD = 9, 255
_BETWEEN = frozenset({"Add", "Mul", "Div", "Cast"})  # from a product to its softmax: mask and scale


@dataclass(frozen=True)
class Attention:
    """One attention: ``scores`` = MatMul(queries, keys), ``softmax``, ``read`` = MatMul(softmax, values).

    ``qk`` and ``v`` are the widths of its heads, ``rows`` how many queries there are; None where dynamic.
    """

    scores: ir.Node
    softmax: ir.Node
    read: ir.Node
    qk: int | None
    v: int | None
    rows: int | None = None

    @property
    def name(self) -> str:
        """The module that it was traced from."""
        return (self.softmax.name or "").split("/")[0]

    @property
    def fits(self) -> bool:
        """Whether an engine has a kernel for heads this wide. One query is a product with a vector, and needs none."""
        return self.rows != 1 and self.qk is not None and self.qk == self.v and SMALLEST_HEAD <= self.qk <= LARGEST_HEAD

    @property
    def padded(self) -> int | None:
        """The width at which it would fit, with zeros added; None where it fits as it is, or is too wide."""
        if self.fits or self.rows == 1 or self.qk is None or self.v is None:
            return None
        # Kernels come in steps of 8 numbers.
        width = max(-(-max(self.qk, self.v) // 8) * 8, 16)
        return width if width <= LARGEST_HEAD else None


def find_attentions(graph: ir.Graph) -> Iterator[Attention]:
    """Every softmax between two products of activations."""
    for node in graph:
        if node.op_type != "Softmax":
            continue
        scores, read = _product_before(node.inputs[0]), _product_after(node.outputs[0])
        if scores is not None and read is not None:
            shape = scores.outputs[0].shape
            rows = shape[-2] if shape is not None and len(shape) > 1 else None
            yield Attention(
                scores,
                node,
                read,
                _width(scores.inputs[0]),
                _width(read.inputs[1]),
                rows if isinstance(rows, int) else None,
            )


def pad_heads(model: ir.Model) -> int:
    """Give every attention that needs it heads of one width, in place; how many were changed.

    Zeros beside queries and keys add nothing to a score, zeros beside values are cut off again: every number stays.

    Given:  MatMul(q[8, N, 32], kᵀ[8, 32, M]) -> Softmax -> MatMul(., v[8, M, 160])
    Result: MatMul(Pad(q)[8, N, 160], Pad(kᵀ)[8, 160, M]) -> Softmax -> MatMul(., v[8, M, 160])
    """
    attentions = [(attention, attention.padded) for attention in find_attentions(model.graph)]
    changed = [(attention, width) for attention, width in attentions if width is not None]
    for attention, width in changed:
        assert attention.qk is not None
        assert attention.v is not None
        _pad(model.graph, attention.scores, 0, -1, width)
        _pad(model.graph, attention.scores, 1, -2, width)
        _pad(model.graph, attention.read, 1, -1, width)
        if width > attention.v:
            _cut(model.graph, attention.read, attention.v)
    return len(changed)


def _product_before(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _BETWEEN:
        inputs = [one for one in node.inputs if one is not None and not one.is_initializer()]
        products = [one.producer() for one in inputs if _rank(one) == _rank(node.outputs[0])]
        node = next((one for one in products if one is not None and _leads_to_product(one)), None)
    return node if node is not None and node.op_type == "MatMul" else None


def _leads_to_product(node: ir.Node) -> bool:
    return node.op_type == "MatMul" or node.op_type in _BETWEEN


def _product_after(value: ir.Value) -> ir.Node | None:
    users = list(value.consumers())
    while len(users) == 1 and users[0].op_type == "Cast":
        users = list(users[0].outputs[0].consumers())
    node = users[0] if len(users) == 1 else None
    return node if node is not None and node.op_type == "MatMul" and node.inputs[1] is not value else None


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else -1


def _width(value: ir.Value | None) -> int | None:
    size = value.shape[-1] if value is not None and value.shape else None
    return size if isinstance(size, int) else None


def _pad(graph: ir.Graph, node: ir.Node, index: int, axis: int, width: int) -> None:
    """Zeros behind the numbers of one axis of an input; a constant is padded now."""
    value = node.inputs[index]
    assert value is not None
    assert value.shape is not None
    size, rank = value.shape[axis], len(value.shape)
    assert isinstance(size, int)
    if size == width:
        return
    pads = np.zeros(2 * rank, np.int64)
    pads[rank:][axis] = width - size
    shape = list(value.shape)
    shape[axis] = width
    name = f"{value.name}.padded_{node.name}"
    padded = ir.Value(name=name, shape=ir.Shape(shape), type=value.type)
    if value.const_value is not None:
        array = np.pad(value.const_value.numpy(), list(zip(pads[:rank], pads[rank:], strict=True)))
        padded.const_value = ir.tensor(array, name=name)
        graph.initializers[name] = padded
    else:
        amounts = constant(graph, f"{name}.pads", pads)
        graph.insert_before(
            node, ir.Node("", "Pad", [value, amounts], outputs=[padded], name=f"{node.name}/Pad_{index}")
        )
    node.replace_input_with(index, padded)


def _cut(graph: ir.Graph, node: ir.Node, width: int) -> None:
    """Keep the first ``width`` numbers of the last axis of a node's result, under the result's name."""
    narrow = node.outputs[0]
    assert narrow.shape is not None
    name, users = narrow.name, list(narrow.uses())
    bounds = [
        constant(graph, f"attention.cut.{what}_{number}", np.array([number], np.int64))
        for what, number in (("start", 0), ("end", width), ("axis", len(narrow.shape) - 1))
    ]
    wide, shape = narrow, narrow.shape
    wide.name = f"{name}.wide"
    cut = ir.Node("", "Slice", [wide, *bounds], outputs=[ir.Value(name=name, type=wide.type, shape=shape)])
    cut.name = f"{node.name}/Slice"
    graph.insert_after(node, cut)
    for user, index in users:
        user.replace_input_with(index, cut.outputs[0])
    padded = node.inputs[1]
    wide.shape = ir.Shape([*shape[:-1], padded.shape[-1] if padded is not None and padded.shape is not None else None])


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer of that name, made once."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    graph.initializers[name] = value
    return value
