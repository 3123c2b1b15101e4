# SPDX-License-Identifier: Apache-2.0
"""fp32 graph -> fp16 or bf16 graph with casts in it, for engines that take precision from the graph alone.

The interface stays float32 and int32. Nodes that would lose too much in 16 bits stay float32, each with a reason:
overflow, indices, long sums, and attention whose scores are too large for 16 bits, in plain and in folded graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.graphs import MOVES, array_of, is_constant, made_by, reached, remove_unused

Half = Literal["fp16", "bf16"]

_DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_LARGEST = {"fp16": 65504.0, "bf16": 3.3895314e38}
# Samples see less than the device will: a value within this factor of the largest number counts as overflow.
HEADROOM = 4.0
# fp16 resolves 1/16 at 64 and 1/2 at 600: a probability is off by as much, so larger scores are not rounded.
LARGEST_SCORE = 64.0
# An integer scale below this loses more than 0.4 % of itself to fp16's subnormals.
_SMALLEST_SCALE = 2.0**-17
# A weight whose largest number is below this has fewer than 7 bits left for the typical one.
_SMALLEST_WEIGHT = 2.0**-13
# Masks are large negative constants added to scores. fp16's mask is finite, so is its sum with any score down to
# -16000, and next to it scores below 16 vanish, as they do next to float32's -1e30.
_MASK, _FP16_MASK = -1e9, -49152.0
# Operators between the products that scores are sums of and the softmax.
_TERMS = MOVES | {"Add", "Sub", "Mul"}
_MASKED = _TERMS | {"Where", "Cast"}
# Operators that make scores, back to the normalised or given numbers that they start from. Folded attention divides
# scores by a deviation of its inputs and adds its logarithm: squares, roots and sums are among them.
_MAKE_SCORES = _TERMS | {"Div", "Pow", "Sqrt", "Reciprocal", "Log", "Cast", "MatMul", "ReduceSum", "ReduceMean"}
# Operators whose result is no larger than their inputs, whose largest number therefore bounds the result.
_NO_LARGER = MOVES | {
    *("Gelu", "Relu", "Floor", "ReduceMax", "ReduceMean", "MaxPool", "AveragePool"),
    *("QuantizeLinear", "DequantizeLinear"),
}
# Squares and sums: cheap, and where fp16 overflows first.
_FP32_OPERATORS = frozenset({"Pow", "ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal"})


def _large_scores(graph: ir.Graph, hazards: Mapping[str, float], masked: set[ir.Value]) -> dict[ir.Node, str]:
    """Each softmax whose scores are large, and all nodes that make them, with the reason.

    ``masked`` are mask constants and values computed from them; their size does not count. The numbers that scores
    start from are those behind a LayerNorm, or the graph's inputs. An int8 linear is left as it is: its own steps are
    coarser than what fp16 would cost.
    """
    kept: dict[ir.Node, str] = {}
    for softmax in graph:
        if softmax.op_type != "Softmax" or softmax.inputs[0] is None:
            continue
        most = _largest_term(softmax.inputs[0], hazards, masked)
        if most > LARGEST_SCORE:
            makers = [node for node, makes in reached(softmax.inputs, _makes_scores).items() if makes]
            kept |= dict.fromkeys((softmax, *makers), f"its scores reach {most:.3g}")
    return kept


def _largest_term(scores: ir.Value, hazards: Mapping[str, float], masked: set[ir.Value]) -> float:
    """The largest of scores and of the terms that they are the sum of, which may cancel; as a part of the score.

    Terms before a product with a scale count times the scale's largest.
    """
    most = 0.0
    pending, seen = [(scores, 1.0)], set[ir.Value]()
    while pending:
        value, factor = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value not in masked:
            most = max(most, factor * largest(value, hazards))
        producer = value.producer()
        if producer is None or producer.op_type not in _TERMS or (producer.op_type == "Mul" and value in masked):
            continue
        terms = [one for one in producer.inputs if one is not None and one.dtype == value.dtype]
        for one in terms:
            others = [largest(other, hazards) for other in terms if other is not one]
            scale = max(others, default=1.0) if producer.op_type == "Mul" else 1.0
            if one.const_value is None:
                pending.append((one, factor * scale))
    return most


def largest(value: ir.Value, hazards: Mapping[str, float]) -> float:
    """The largest |x| of a constant, or the one seen; 0 where it is unknown."""
    if is_constant(value):
        return float(np.max(np.abs(array_of(value)), initial=0.0))
    return hazards.get(value.name or "", 0.0)


def _makes_scores(node: ir.Node) -> bool:
    if node.op_type == "MatMul":
        return not any(value and made_by(value, "DequantizeLinear") for value in node.inputs)
    return node.op_type in _MAKE_SCORES


def to_half(model: ir.Model, precision: Half, hazards: Mapping[str, float] | None = None) -> dict[str, str]:
    """Cast the graph in place; gives the names of nodes that stay float32, each with the reason.

    ``hazards`` is the largest |x| seen of each float tensor, by its name. float32 stay: what reads or writes a tensor
    beyond the format's range (with `HEADROOM`), sums over more terms than fp16 can count, squares and their means,
    indices, integer scales and weights too small for fp16, products of integers beside them, and attention whose scores
    are large. Constants that mask scores become the largest that fp16 takes without overflow, where fp16 reads them.

    Given:  MatMul(x, W) -> Add(y, b) -> LayerNormalization(z)       where |z| reached 1e6
    Result: Cast16(x), MatMul(., W16), Cast32(y), Add(., b) -> LayerNormalization(z), Cast16(.)
    """
    graph, low = model.graph, _DTYPES[precision]
    kept = _overflows(graph, precision, hazards or {})
    kept = _integer_products(graph, kept) | kept
    casts = _Casts(graph)
    for node in list(graph):
        _cast_node(node, ir.DataType.FLOAT if node in kept else low, casts)
    for index, value in enumerate(graph.outputs):
        if value.dtype == low:
            name, value.name = value.name, f"{value.name}.{low.name.lower()}"
            graph.outputs[index] = casts.of(value, ir.DataType.FLOAT)
            graph.outputs[index].name = name
    remove_unused(graph)
    return {node.name or "": reason for node, reason in kept.items()}


def _overflows(graph: ir.Graph, precision: Half, hazards: Mapping[str, float]) -> dict[ir.Node, str]:
    """The nodes that must stay float32, with the reason.

    In fp16, masks are made finite in place, except those that only such nodes read.
    """
    masks = _clamp_masks(graph) if precision == "fp16" else {}
    masked = _masked(graph, masks)
    hazards = _carried(graph, hazards)
    kept = {node: reason for node in graph if (reason := _reason(node, precision, hazards, masked))}
    kept |= dict.fromkeys(_index_arithmetic(graph), "it computes an index")
    kept = _large_scores(graph, hazards, masked) | kept
    for value, given in masks.items():
        if all(reader in kept for one in _masked(graph, [value]) for reader in one.consumers()):
            value.const_value = given  # scores that float32 is kept for may be larger than fp16's mask
    return kept


def _reason(node: ir.Node, precision: Half, hazards: Mapping[str, float], masked: set[ir.Value]) -> str:
    """Why a node must stay float32; empty where it need not."""
    for value in (*node.inputs, *node.outputs):
        if value is None or value.dtype != ir.DataType.FLOAT or value in masked:
            continue
        most = largest(value, hazards)
        if not most < _LARGEST[precision] / (1 if value.const_value is not None else HEADROOM):
            return f"|{value.name}| reaches {most:.3g}"
    if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return "it holds a graph"
    if precision == "bf16":
        return ""
    if node.op_type in _FP32_OPERATORS or (node.op_type == "Mul" and node.inputs[0] is node.inputs[1]):
        return "it squares or sums"
    second = node.inputs[1] if len(node.inputs) > 1 else None
    constant = second if second is not None and is_constant(second) else None
    if constant and node.op_type in ("MatMul", "Gemm", "Conv") and 0 < largest(constant, {}) < _SMALLEST_WEIGHT:
        return f"its weight is at most {largest(constant, {}):.3g}"
    if (depth := reduction_depth(node)) > _LARGEST["fp16"]:
        return f"it sums {depth} terms"
    if constant and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        smallest = float(np.min(array_of(constant)))
        if smallest < _SMALLEST_SCALE:
            return f"its scale is {smallest:.3g}"
    return ""


def _carried(graph: ir.Graph, hazards: Mapping[str, float]) -> dict[str, float]:
    """Hazards, and those of the tensors that are made of such without becoming larger."""
    known = dict(hazards)
    for node in graph:
        if node.op_type in _NO_LARGER:
            most = max((known.get(value.name or "", 0.0) for value in node.inputs if value is not None), default=0.0)
            for value in node.outputs:
                known.setdefault(value.name or "", most)
    return known


def _integer_products(graph: ir.Graph, kept: Mapping[ir.Node, str]) -> dict[ir.Node, str]:
    """Products of integers that must stay float32 because a scale of theirs, or a product of the same tensor, does.

    TensorRT for RTX (1.7.1) does not compile a product whose two scales differ in type, nor products that read one
    tensor and differ so.
    """
    products: dict[ir.Value | None, list[ir.Node]] = {}
    reasons: dict[ir.Value | None, str] = {}
    for node in graph:
        integers = [made for value in node.inputs[:2] if (made := made_by(value, "DequantizeLinear"))]
        if node.op_type in ("MatMul", "Gemm") and len(integers) == 2:
            read = integers[0].inputs[0]
            products.setdefault(read, []).append(node)
            for one in (node, *integers):
                if one in kept:
                    reasons.setdefault(read, kept[one])
    return {node: reason for read, reason in reasons.items() for node in products[read]}


def _index_arithmetic(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that compute numbers that become integers: fp16 counts to 2048, and a grid has more points."""
    casts = [
        node for node in graph if node.op_type in ("Cast", "CastLike") and node.outputs[0].dtype not in (None, *_FLOATS)
    ]
    before = reached((value for node in casts for value in node.inputs), lambda node: node.outputs[0].dtype in _FLOATS)
    return {*casts, *(node for node, is_float in before.items() if is_float)}


def reduction_depth(node: ir.Node) -> int:
    """How many terms a node adds up for one number of its result; 1 where it adds none, or their number is dynamic."""
    source = node.inputs[0] if node.inputs else None
    if source is None or source.shape is None or node.op_type not in ("MatMul", "Softmax"):
        return 1
    axis = node.attributes.get_int("axis", -1) if node.op_type == "Softmax" else -1
    size = source.shape[axis]
    return size if isinstance(size, int) else 1


def _clamp_masks(graph: ir.Graph) -> dict[ir.Value, ir.TensorProtocol]:
    """Make mask constants finite in fp16; returns them with their old values."""
    found: dict[ir.Value, ir.TensorProtocol] = {}
    for value in graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            array = array_of(value)
            if np.min(array, initial=0.0) <= _MASK:
                found[value] = value.const_value
                value.const_value = ir.tensor(np.maximum(array, np.float32(_FP16_MASK)), name=value.name)
    return found


def _masked(graph: ir.Graph, masks: Iterable[ir.Value]) -> set[ir.Value]:
    """Mask constants, and the sums and copies of them. They go into a softmax or, from an image's padded border, into a
    maximum.
    """
    masked = set(masks)
    for node in graph:
        if node.op_type in _MASKED and any(value in masked for value in node.inputs if value is not None):
            masked.update(node.outputs)
    return masked


def _cast_node(node: ir.Node, wanted: ir.DataType, casts: _Casts) -> None:
    """Give a node inputs of its precision, and its outputs that type."""
    if node.op_type == "Cast" and node.attributes.get_int("to") == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(wanted))
    else:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in _FLOATS and value.dtype != wanted:
                node.replace_input_with(index, casts.of(value, wanted))
    for output in node.outputs:
        if output.dtype == ir.DataType.FLOAT:
            output.dtype = wanted


class _Casts:
    """The numbers of a graph in other types: one Cast for all that ask."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._made = graph, dict[tuple[ir.Value, ir.DataType], ir.Value]()

    def of(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The same number in another type: a converted constant, a Cast, or a second DequantizeLinear."""
        if (value, dtype) not in self._made:
            name = f"{value.name}.{dtype.name.lower()}"
            self._made[value, dtype] = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
            self._make(value, self._made[value, dtype], dtype)
        return self._made[value, dtype]

    def _make(self, value: ir.Value, result: ir.Value, dtype: ir.DataType) -> None:
        suffix, producer = dtype.name.lower(), value.producer()
        if value.const_value is not None:
            result.const_value = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), name=result.name)
            self._graph.initializers[result.name or ""] = result
            return
        if dtype == ir.DataType.FLOAT and (dequantize := made_by(value, "DequantizeLinear")):
            # A Cast would hide from engines that the product behind is one of integers. One that stays float32 does so
            # for its scale, which would be lost in 16 bits: that is cast, and is no product of integers
            # (`_integer_products`).
            integers, scale, *zeros = dequantize.inputs
            assert scale is not None
            inputs, attributes = [integers, self.of(scale, dtype), *zeros], dequantize.attributes.values()
            node = ir.Node(
                "", "DequantizeLinear", inputs, attributes, outputs=[result], name=f"{dequantize.name}/{suffix}"
            )
        else:
            node = ir.node("Cast", [value], {"to": int(dtype)}, outputs=[result])
            node.name = f"{producer.name if producer else value.name}/Cast_{suffix}"
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
