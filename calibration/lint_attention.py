# SPDX-License-Identifier: Apache-2.0
"""Which attentions of a graph become one kernel in a version of TensorRT, and why the others do not.

What the kernels take was measured on TensorRT for RTX 1.7; of other versions it is the best that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from perceiver_export.calibration.lowering.attention import LARGEST_HEAD, SMALLEST_HEAD, Attention, find_attentions
from perceiver_export.runtimes.engines.tensorrt_capabilities import Capabilities

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# What may lie between a softmax and the products before and behind it, in attention of any form.
_BETWEEN = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Cast", "CastLike", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice"),
        *("Concat", "Expand", "Split", "Pad", "ReduceSum", "QuantizeLinear", "DequantizeLinear"),
    }
)
FOLDED = "folded: inputs and constants are multiplied in it, no queries, keys and values"
ONE_QUERY = "one query: products with a vector, which need no kernel of their own"
FP32 = "fp32: a kernel takes 16 bits, in which scores this large would be too coarse"
NOT_LOWERED = "fp32: a kernel takes 16 bits"
PART_INT8 = "part of it is int8: one kernel becomes three, with the scores in memory"


def attentions(graph: ir.Graph, can: Capabilities) -> dict[str, str]:
    """Every attention by its softmax's name, with why it is not one kernel; empty where it is."""
    known = {one.softmax: one for one in find_attentions(graph)}
    lowered = can.typing == "weak" or is_half(graph)
    found = {}
    for node in graph:
        if node in known:
            found[node.name or ""] = _reason(known[node], can, lowered)
        elif node.op_type == "Softmax" and _is_attention(node):
            found[node.name or ""] = FOLDED
    return found


def is_half(graph: ir.Graph) -> bool:
    """Whether something is computed in 16 bits."""
    return any(value.dtype in HALF for node in graph for value in node.outputs)


def is_partly_int8(attention: Attention) -> bool:
    """Whether some of q, k, probabilities, v and the result are int8, and not all."""
    sides = [dequantized(value) for value in (*attention.scores.inputs[:2], *attention.read.inputs[:2])]
    output = any(user.op_type == "QuantizeLinear" for user in attention.read.outputs[0].consumers())
    return any(sides) and not (all(sides) and output)


def is_folded(attention: Attention) -> bool:
    """Whether scores are multiplied by what changes with the inputs, as by a folded LayerNorm's deviations."""
    pending, seen = [attention.softmax], {attention.scores}
    while pending:
        for value in pending.pop().inputs:
            node = value.producer() if value is not None else None
            if node is None or node in seen or node.op_type not in _BETWEEN:
                continue
            if node.op_type in ("Mul", "Div") and not any(_is_constant(one) for one in node.inputs):
                return True
            seen.add(node)
            pending.append(node)
    return False


def _is_constant(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return value is not None and (value.is_initializer() or (producer is not None and producer.op_type == "Constant"))


def dequantized(value: ir.Value | None) -> ir.Node | None:
    """What makes a value of integers, past what only shapes or casts it; None where it comes from floats."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Transpose", "Reshape", "Pad", "Slice", "Cast"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def widths(attention: Attention) -> str:
    """What its heads are, beside what a kernel takes."""
    return (
        f"its heads are {attention.qk or '?'} wide for queries and keys, {attention.v or '?'} for values; attention is"
        f" one kernel where they are equal, from {SMALLEST_HEAD} to {LARGEST_HEAD}"
    )


def _reason(attention: Attention, can: Capabilities, lowered: bool) -> str:
    if attention.rows == 1:
        return ONE_QUERY
    if is_folded(attention):
        return FOLDED
    if not attention.fits:
        return widths(attention)
    if is_partly_int8(attention):
        return PART_INT8
    if can.typing != "weak" and attention.scores.outputs[0].dtype == ir.DataType.FLOAT:
        return FP32 if lowered else NOT_LOWERED
    return ""


def _is_attention(softmax: ir.Node) -> bool:
    """Whether it lies between products, with more around it than a kernel knows."""
    before = _reaches(softmax, lambda node: (value.producer() for value in node.inputs if value is not None))
    return before and _reaches(softmax, lambda node: (user for value in node.outputs for user in value.consumers()))


def _reaches(softmax: ir.Node, step: Callable[[ir.Node], Iterator[ir.Node | None]]) -> bool:
    pending, seen = [softmax], {softmax}
    while pending:
        for node in step(pending.pop()):
            if node is None or node in seen:
                continue
            if node.op_type in ("MatMul", "Gemm", "Einsum"):
                return True
            seen.add(node)
            if node.op_type in _BETWEEN:
                pending.append(node)
    return False
