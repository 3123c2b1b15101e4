# SPDX-License-Identifier: Apache-2.0
"""Rewrite an fp32 graph in fp16 or bf16 with casts, for engines that take precision only from the graph.

Inputs and outputs stay float32 and int32. Nodes that would lose too much accuracy in 16 bits stay float32, each with a
reason: overflow, indices, angles, long sums, lost epsilons, and attention whose scores are too large for 16 bits, in
plain and folded graphs. So do nodes for which ONNX allows no 16-bit type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.graphs import MOVES, array_of, dims, is_constant, made_by, reached, remove_unused
from perceiver_export.calibration.lowering.schemas import allowed, follows

Half = Literal["fp16", "bf16"]

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_LARGEST = {"fp16": 65504.0, "bf16": 3.3895314e38}
# Values on the device may exceed those in the samples, so a value within this factor of the limit counts as overflow.
HEADROOM = 4.0
# fp16 resolves 1/16 at 64 and 1/2 at 600. The error carries over to probabilities, so larger scores are not rounded.
LARGEST_SCORE = 64.0
# An integer scale or epsilon below this loses more than 0.4 % of itself to fp16's subnormals.
_SMALLEST_SCALE = 2.0**-17
# If a weight's largest value is below this, fewer than 7 bits are left for its typical values.
_SMALLEST_WEIGHT = 2.0**-13
# Masks are large negative constants added to scores. The fp16 mask is finite, and so is its sum with any score down to
# -16000. Scores below 16 vanish in that sum, as they do next to float32's -1e30.
_MASK, _FP16_MASK = -1e9, -49152.0
# Operators between the softmax and the products whose sum the scores are.
_TERMS = MOVES | {"Add", "Sub", "Mul"}
_MASKED = _TERMS | {"Where", "Cast"}
# Operators that compute scores from normalized values or the graph's inputs. They include squares, roots and sums,
# because folded attention divides scores by a deviation of its inputs and adds its logarithm.
_MAKE_SCORES = _TERMS | {"Div", "Pow", "Sqrt", "Reciprocal", "Log", "Cast", "MatMul", "ReduceSum", "ReduceMean"}
# Operators that compute indices and angles, and those that compare.
_ARITHMETIC = (_MAKE_SCORES - {"MatMul"}) | {
    *("Neg", "Abs", "Floor", "Ceil", "Round", "Mod", "Min", "Max", "Clip", "Where", "Exp", "Range", "CumSum"),
    *("ReduceMin", "ReduceMax", "Einsum", "Gemm"),
}
_COMPARE = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "ArgMax", "ArgMin", "TopK", "NonZero"}
# Operators that add an epsilon or choose it, and those that need one.
_TAKE_EPSILON = frozenset({"Add", "Sub", "Max", "Min", "Clip", "Div", "Where"})
_NEED_EPSILON = frozenset({"Div", "Log", "Pow", "Reciprocal", "Sqrt"})
# Operators whose result is never larger than their inputs, so the inputs' largest value bounds it.
_NO_LARGER = MOVES | {
    *("Gelu", "Relu", "Floor", "ReduceMax", "ReduceMean", "MaxPool", "AveragePool"),
    *("QuantizeLinear", "DequantizeLinear"),
}
# Squares and sums: they are cheap, and fp16 overflows in them first.
_FP32_OPERATORS = frozenset({"Pow", "ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal"})


def _large_scores(graph: ir.Graph, hazards: Mapping[str, float], masked: set[ir.Value]) -> dict[ir.Node, str]:
    """Each softmax with large scores and all nodes that compute them, with the reason.

    ``masked`` has mask constants and values computed from them, whose size does not count. Scores are traced back to
    the outputs of LayerNorms or the graph's inputs. An int8 linear layer is not included, because its own steps are
    coarser than those of fp16.
    """
    kept: dict[ir.Node, str] = {}
    for softmax in graph:
        scores = softmax.inputs[0] if softmax.op_type == "Softmax" else None
        if scores is not None and (most := _largest_term(scores, hazards, masked)) > LARGEST_SCORE:
            makers = [node for node, makes in reached([scores], _makes_scores).items() if makes]
            kept |= dict.fromkeys((softmax, *makers), f"its scores reach {most:.3g}")
    return kept


def _largest_term(scores: ir.Value, hazards: Mapping[str, float], masked: set[ir.Value]) -> float:
    """The largest |x| of the scores and of the terms whose sum they are, because large terms may cancel.

    A term that is multiplied by a scale counts times the scale's largest value.
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
    """The largest |x| of a constant, or the largest observed; 0 if unknown."""
    if is_constant(value):
        return float(np.max(np.abs(array_of(value)), initial=0.0))
    return hazards.get(value.name or "", 0.0)


def _makes_scores(node: ir.Node) -> bool:
    if node.op_type == "MatMul":
        return not any(value and made_by(value, "DequantizeLinear") for value in node.inputs)
    return node.op_type in _MAKE_SCORES


def to_half(model: ir.Model, precision: Half, hazards: Mapping[str, float] | None = None) -> dict[str, str]:
    """Cast the graph in place. Returns the names of nodes that stay float32, each with the reason.

    ``hazards`` has the largest observed |x| of each float tensor by name. These nodes stay float32: those that read or
    write a tensor beyond the format's range (with `HEADROOM`), sums over more terms than fp16 can count, squares and
    their means, indices, angles, integer scales, weights and epsilons too small for fp16, integer products that share a
    tensor with them, attention with large scores, and nodes whose type is fixed. Mask constants that fp16 nodes read
    become finite in fp16.

    Given:  MatMul(x, W) -> Add(y, b) -> LayerNormalization(z)       where |z| reached 1e6
    Result: Cast16(x), MatMul(., W16), Cast32(y), Add(., b) -> LayerNormalization(z), Cast16(.)
    """
    graph, low = model.graph, DTYPES[precision]
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

    For fp16, masks are made finite in place, except masks that only such nodes read.
    """
    masks = _clamp_masks(graph) if precision == "fp16" else {}
    masked = _masked(graph, masks)
    hazards = _carried(graph, hazards)
    kept = {node: reason for node in graph if (reason := _reason(node, precision, hazards, masked))}
    if precision == "fp16":
        kept = dict.fromkeys(_epsilons(graph), "fp16 loses its epsilon") | kept
    kept |= dict.fromkeys(_angles(graph), "it computes an angle")
    kept |= dict.fromkeys(_index_arithmetic(graph, DTYPES[precision]), "it computes an index")
    kept = _large_scores(graph, hazards, masked) | kept
    for value, given in masks.items():
        if all(reader in kept for one in _masked(graph, [value]) for reader in one.consumers()):
            value.const_value = given  # scores that stay float32 may be larger than the fp16 mask
    return kept


def _reason(node: ir.Node, precision: Half, hazards: Mapping[str, float], masked: set[ir.Value]) -> str:
    """Why a node must stay float32; empty if it need not."""
    for value in (*node.inputs, *node.outputs):
        if value is None or value.dtype != ir.DataType.FLOAT or value in masked:
            continue
        most = largest(value, hazards)
        if not most < _LARGEST[precision] / (1 if value.const_value is not None else HEADROOM):
            return f"|{value.name}| reaches {most:.3g}"
    if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return "it contains a subgraph"
    if not follows(node, DTYPES[precision]):
        return "its type is fixed"
    if precision == "bf16":
        return ""
    if node.op_type in _FP32_OPERATORS or (node.op_type == "Mul" and node.inputs[0] is node.inputs[1]):
        return "it squares or sums"
    second = node.inputs[1] if len(node.inputs) > 1 else None
    constant = second if is_constant(second) else None
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
    """Hazards, extended to tensors that are computed from them without becoming larger."""
    known = dict(hazards)
    for node in graph:
        if node.op_type in _NO_LARGER:
            most = max((known.get(value.name or "", 0.0) for value in node.inputs if value is not None), default=0.0)
            for value in node.outputs:
                known.setdefault(value.name or "", most)
    return known


def _integer_products(graph: ir.Graph, kept: Mapping[ir.Node, str]) -> dict[ir.Node, str]:
    """Integer products that must stay float32 because one of their scales or another product of the same tensor does.

    TensorRT for RTX (1.7.1) does not compile a product whose two scales differ in type, nor products of the same tensor
    whose types differ.
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


def _index_arithmetic(graph: ir.Graph, low: ir.DataType) -> set[ir.Node]:
    """Nodes that compute indices, or compute or compare counts.

    fp16 counts only to 2048, but a grid has more points.
    """
    casts = [
        node for node in graph if node.op_type in ("Cast", "CastLike") and node.outputs[0].dtype not in (None, *_FLOATS)
    ]
    before = reached((value for node in casts for value in node.inputs), lambda node: node.outputs[0].dtype in _FLOATS)
    counts = _counts(graph, low)
    compared = [node for node in graph if node.op_type in _COMPARE and not counts.isdisjoint(node.inputs)]
    makers = reached((value for node in compared for value in node.inputs), lambda node: node.outputs[0] in counts)
    return {*casts, *compared, *(node for found in (before, makers) for node, kept in found.items() if kept)}


def _counts(graph: ir.Graph, low: ir.DataType) -> set[ir.Value | None]:
    """Float values that are computed from integers, or from constants of integers that 16 bits would round."""
    found = {value for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT and _rounds(value, low)}
    counts: set[ir.Value | None] = {*found}
    for node in graph:
        if node.outputs[0].dtype != ir.DataType.FLOAT or node.op_type not in _ARITHMETIC:
            continue
        read = [value for value in node.inputs if value is not None and value.dtype in _FLOATS]
        cast = node.op_type in ("Cast", "CastLike") and node.inputs[0] not in read
        computed = any(one in counts for one in read) and all(one in counts or one.producer() is None for one in read)
        if cast or computed or node.op_type == "Range":
            counts.update(node.outputs)
    return counts


def _rounds(value: ir.Value, low: ir.DataType) -> bool:
    array = array_of(value)
    if not np.array_equal(array, np.rint(array)):
        return False
    with np.errstate(over="ignore"):
        rounded = array.astype(low.numpy()).astype(array.dtype)
    return not np.array_equal(array, rounded)


def _angles(graph: ir.Graph) -> set[ir.Node]:
    """Each Sin and Cos with the nodes that compute its angle. Near 1000, fp16 numbers are half a radian apart."""
    waves = [node for node in graph if node.op_type in ("Sin", "Cos")]
    before = reached((node.inputs[0] for node in waves), _makes_angles)
    return {*waves, *(node for node, makes in before.items() if makes)}


def _makes_angles(node: ir.Node) -> bool:
    """Products of inputs with frequencies are angles; those of computed values are a network's layers."""
    if node.op_type in ("MatMul", "Gemm", "Einsum"):
        before = reached(node.inputs, lambda one: one.op_type in _TERMS | {"Cast", "Div"})
        return all(before.values()) and node.outputs[0].dtype in _FLOATS
    return node.op_type in _ARITHMETIC and node.outputs[0].dtype in _FLOATS


def _epsilons(graph: ir.Graph) -> set[ir.Node]:
    """Nodes with an epsilon that fp16 rounds to 0, and those that divide by the result or take its logarithm or root.

    Products with a reciprocal are among them: 1 / sqrt(1e-12) overflows fp16, and times 0 it is NaN.
    """
    kept: set[ir.Node] = set()
    for node in graph:
        if node.op_type not in _TAKE_EPSILON or not any(map(_is_epsilon, node.inputs)):
            continue
        met = reached(node.outputs, _passes_epsilon, forward=True)
        readers = {one for one, passes in met.items() if passes or one.op_type in {*_NEED_EPSILON, "Mul"}}
        if any(one.op_type in _NEED_EPSILON for one in (node, *readers)):
            kept |= {node, *readers}
    return kept


def _is_epsilon(value: ir.Value | None) -> bool:
    return is_constant(value) and value.dtype == ir.DataType.FLOAT and 0 < largest(value, {}) < _SMALLEST_SCALE


def _passes_epsilon(node: ir.Node) -> bool:
    return node.op_type in MOVES | {"Pow", "Reciprocal", "Sqrt"} or (
        node.op_type == "Div" and is_constant(node.inputs[0])
    )


def reduction_depth(node: ir.Node) -> int:
    """The number of terms that a node adds for one output value; 1 if it adds none, or the number is dynamic."""
    sizes = dims(node.inputs[0]) if node.op_type in ("MatMul", "Softmax") else ()
    return sizes[node.attributes.get_int("axis", -1)] if sizes else 1  # a MatMul has no axis


def _clamp_masks(graph: ir.Graph) -> dict[ir.Value, ir.TensorProtocol]:
    """Make mask constants finite in fp16. Returns them with their old values."""
    found: dict[ir.Value, ir.TensorProtocol] = {}
    for value in graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            array = array_of(value)
            if np.min(array, initial=0.0) <= _MASK:
                found[value] = value.const_value
                value.const_value = ir.tensor(np.maximum(array, np.float32(_FP16_MASK)), name=value.name)
    return found


def _masked(graph: ir.Graph, masks: Iterable[ir.Value]) -> set[ir.Value]:
    """Mask constants and values computed from them, which lead to a softmax or, at an image's padded border, a max."""
    masked = set(masks)
    for node in graph:
        if node.op_type in _MASKED and any(value in masked for value in node.inputs if value is not None):
            masked.update(node.outputs)
    return masked


def _cast_node(node: ir.Node, wanted: ir.DataType, casts: _Casts) -> None:
    """Cast a node's inputs to its precision, where ONNX allows that, and give its outputs that type."""
    if node.op_type == "Cast" and node.attributes.get_int("to") == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(wanted))
    else:
        for index, (value, name) in enumerate(zip(node.inputs, allowed(node, wanted), strict=True)):
            dtype = wanted if name else ir.DataType.FLOAT
            if value is not None and value.dtype in _FLOATS and value.dtype != dtype:
                node.replace_input_with(index, casts.of(value, dtype))
    for output in node.outputs:
        if output.dtype == ir.DataType.FLOAT:
            output.dtype = wanted


class _Casts:
    """A graph's values in other types, with one Cast for all their readers."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._made = graph, dict[tuple[ir.Value, ir.DataType], ir.Value]()

    def of(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The same value in another type: a converted constant, a Cast, or a second DequantizeLinear."""
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
            # A Cast would hide from engines that the next product is one of integers. A DequantizeLinear that stays
            # float32 because of its scale, which 16 bits would lose, is cast: its reader is not an integer product
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
