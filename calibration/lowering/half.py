# SPDX-License-Identifier: Apache-2.0
"""fp32 graph -> fp16 or bf16 graph, with casts in it: what engines want that take precision from the graph alone.

The interface stays float32 and int32. What does not fit into 16 bits stays float32, and the reason is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.lowering.scores import large_scores, largest

Half = Literal["fp16", "bf16"]

_DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_LARGEST = {"fp16": 65504.0, "bf16": 3.3895314e38}
# Samples see less than the device will: what came within this factor of the largest number counts as overflow.
HEADROOM = 4.0
# An integer scale below this loses more than 0.4 % of itself to fp16's subnormals.
_SMALLEST_SCALE = 2.0**-17
# A weight whose largest number is below this has fewer than 7 bits left for the typical one.
_SMALLEST_WEIGHT = 2.0**-13
# Masks are large negative constants added to scores. This one is finite in fp16, so is its sum with any score down to
# -16000, and next to it scores below 16 vanish, as they do next to float32's -1e30.
_MASK, _FP16_MASK = -1e9, -49152.0
_MASKED = frozenset(
    {
        *("Add", "Sub", "Mul", "Where", "Pad", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Concat"),
        *("Expand", "Gather", "Cast", "CastLike", "Identity", "Split"),
    }
)
# What gives no larger number than it takes: so the largest that went in bounds what comes out, which nobody measured.
_NO_LARGER = frozenset(
    {
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Concat", "Expand", "Pad", "Split"),
        *("Flatten", "Identity", "Gelu", "Relu", "Floor", "ReduceMax", "ReduceMean", "MaxPool", "AveragePool"),
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
# Squares and sums: cheap, and where fp16 overflows first.
_FP32_OPERATORS = frozenset({"Pow", "ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal"})


@dataclass
class _State:
    graph: ir.Graph
    low: ir.DataType
    kept: dict[str, str]
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)


def to_half(model: ir.Model, precision: Half, hazards: Mapping[str, float] | None = None) -> dict[str, str]:
    """Cast the graph in place; gives the names of nodes that stay float32, each with the reason.

    ``hazards`` is the largest |x| seen of each float tensor, by its name. float32 stay: what reads or writes a tensor
    beyond the format's range (with `HEADROOM`), sums over more terms than fp16 can count, squares and their means,
    indices, integer scales and weights too small for fp16, products of integers beside them, and attention whose scores
    are large. Constants that mask scores become the largest that fp16 takes without overflow, where fp16 reads them.

    Given:  MatMul(x, W) -> Add(y, b) -> LayerNormalization(z)       where |z| reached 1e6
    Result: Cast16(x), MatMul(., W16), Cast32(y), Add(., b) -> LayerNormalization(z), Cast16(.)
    """
    graph = model.graph
    kept = overflows(graph, precision, hazards or {})
    kept = _integer_products(graph, kept) | kept
    state = _State(graph, _DTYPES[precision], kept)
    for node in list(graph):
        _cast_node(node, state)
    for index, value in enumerate(graph.outputs):
        if value.dtype == state.low:
            graph.outputs[index] = _cast_output(value, state)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return kept


def overflows(graph: ir.Graph, precision: Half, hazards: Mapping[str, float]) -> dict[str, str]:
    """Names of the nodes that must stay float32, with the reason. In fp16, masks are made finite in place, but for
    those that only such nodes read.
    """
    masks = _clamp_masks(graph) if precision == "fp16" else {}
    masked = _masked(graph, masks)
    hazards = _carried(graph, hazards)
    reasons = ((node.name or "", _reason(node, precision, hazards, masked)) for node in graph)
    kept = {name: reason for name, reason in reasons if reason}
    kept |= {node.name or "": "it computes an index" for node in _index_arithmetic(graph)}
    kept = large_scores(graph, hazards, masked) | kept
    for value, given in masks.items():
        readers = {user for one in _masked(graph, [value]) for user in one.consumers()}
        if all((node.name or "") in kept for node in readers):
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
    weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm", "Conv") else None
    if weight is not None and weight.const_value is not None and 0 < largest(weight, {}) < _SMALLEST_WEIGHT:
        return f"its weight is at most {largest(weight, {}):.3g}"
    depth = reduction_depth(node)
    if depth > _LARGEST["fp16"]:
        return f"it sums {depth} terms"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        scale = node.inputs[1]
        if scale is not None and scale.const_value is not None:
            smallest = float(np.min(scale.const_value.numpy()))
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


def _integer_products(graph: ir.Graph, kept: Mapping[str, str]) -> dict[str, str]:
    """Products of integers to stay float32, since one beside them does, or a scale of theirs: TensorRT for RTX does not
    compile those whose two scales differ in type, nor those that do so among all that read one tensor (1.7.1).
    """
    readers: dict[ir.Value | None, list[ir.Node]] = {}
    reasons: dict[ir.Value | None, str] = {}
    for node in graph:
        sides = [value.producer() for value in node.inputs[:2] if value] if node.op_type in ("MatMul", "Gemm") else []
        integers = [side for side in sides if side is not None and side.op_type == "DequantizeLinear"]
        if len(integers) < 2:
            continue
        read = integers[0].inputs[0]
        readers.setdefault(read, []).append(node)
        for one in (node, *integers):
            if (one.name or "") in kept:
                reasons.setdefault(read, kept[one.name or ""])
    return {node.name or "": reason for read, reason in reasons.items() for node in readers[read]}


def _index_arithmetic(graph: ir.Graph) -> set[ir.Node]:
    """What computes numbers that become integers: fp16 counts to 2048, and a grid has more points."""
    found: set[ir.Node] = set()
    pending = [
        node for node in graph if node.op_type in ("Cast", "CastLike") and node.outputs[0].dtype not in (None, *_FLOATS)
    ]
    while pending:
        node = pending.pop()
        for value in node.inputs:
            producer = value.producer() if value is not None and value.dtype in _FLOATS else None
            if producer is not None and producer not in found:
                found.add(producer)
                pending.append(producer)
        found.add(node)
    return found


def reduction_depth(node: ir.Node) -> int:
    """How many terms a node adds up for one number of its result; 1 where it adds none, or their number is dynamic."""
    source = node.inputs[0] if node.inputs else None
    if source is None or source.shape is None or node.op_type not in ("MatMul", "Softmax"):
        return 1
    axis = node.attributes.get_int("axis", -1) if node.op_type == "Softmax" else -1
    size = source.shape[axis]
    return size if isinstance(size, int) else 1


def _clamp_masks(graph: ir.Graph) -> dict[ir.Value, ir.TensorProtocol]:
    """Make mask constants finite in fp16; gives them, with what they were."""
    found: dict[ir.Value, ir.TensorProtocol] = {}
    for value in graph.initializers.values():
        if value.dtype != ir.DataType.FLOAT or value.const_value is None:
            continue
        array = value.const_value.numpy()
        if array.size and float(array.min()) <= _MASK:
            found[value] = value.const_value
            value.const_value = ir.tensor(np.maximum(array, np.float32(_FP16_MASK)), name=value.name)
    return found


def _masked(graph: ir.Graph, masks: Iterable[ir.Value]) -> set[ir.Value]:
    """Mask constants and the sums and copies of them, which go into a softmax, or, of a picture's padded border, into a
    largest number.
    """
    masked = set(masks)
    for node in graph:
        if node.op_type in _MASKED and any(value in masked for value in node.inputs if value is not None):
            masked.update(node.outputs)
    return masked


def _cast_node(node: ir.Node, state: _State) -> None:
    """Give a node inputs of its precision, and its outputs that type."""
    wanted = ir.DataType.FLOAT if (node.name or "") in state.kept else state.low
    if node.op_type == "Cast" and node.attributes.get_int("to") == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(wanted))
    else:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (ir.DataType.FLOAT, state.low) and value.dtype != wanted:
                node.replace_input_with(index, _as(value, wanted, state))
    for output in node.outputs:
        if output.dtype == ir.DataType.FLOAT:
            output.dtype = wanted


def _as(value: ir.Value, dtype: ir.DataType, state: _State) -> ir.Value:
    """The same number in another type: a converted constant, or one Cast for all who ask; of a DequantizeLinear that
    float32 is asked of, another one.
    """
    if (value, dtype) in state.casts:
        return state.casts[value, dtype]
    suffix, producer = dtype.name.lower(), value.producer()
    result = ir.Value(name=f"{value.name}.{suffix}", shape=value.shape, type=ir.TensorType(dtype))
    if producer is not None and producer.op_type == "DequantizeLinear" and dtype == ir.DataType.FLOAT:
        # A Cast would hide from engines that the product behind is one of integers. One that stays float32 does so for
        # its scale, which would be lost in 16 bits: that is cast, and is no product of integers (`_integer_products`).
        scale = producer.inputs[1]
        assert scale is not None
        inputs = [producer.inputs[0], _as(scale, dtype, state), *producer.inputs[2:]]
        again = ir.Node("", producer.op_type, inputs, producer.attributes.values(), outputs=[result])
        again.name = f"{producer.name}/{suffix}"
        state.graph.insert_after(producer, again)
    elif value.const_value is not None:
        # Lazily, or two copies of all weights would be in memory at once.
        array = value.const_value.numpy().astype(dtype.numpy())
        result.const_value = ir.tensor(array, name=result.name)
        state.graph.initializers[result.name or ""] = result
    else:
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], outputs=[result])
        cast.name = f"{producer.name if producer else value.name}/Cast_{suffix}"
        if producer is None:
            state.graph.insert_before(state.graph[0], cast)
        else:
            state.graph.insert_after(producer, cast)
    state.casts[value, dtype] = result
    return result


def _cast_output(value: ir.Value, state: _State) -> ir.Value:
    """The graph's output, under its own name, in float32."""
    name = value.name
    value.name = f"{name}.{state.low.name.lower()}"
    result = _as(value, ir.DataType.FLOAT, state)
    result.name = name
    return result
