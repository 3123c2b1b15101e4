# SPDX-License-Identifier: Apache-2.0
"""The rules of `lint`: each looks at a graph and says what TensorRT would refuse, or run slower than it could.

Each rule was seen to hold on TensorRT for RTX 1.7.1: a minimal graph that breaks it does not compile, or loses its
fused attention or its int8 product (tests/calibration/test_lint_rules.py). The versions in which an operator came are
NVIDIA's documentation and the bindings' attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.lint_attention import (
    HALF,
    NOT_LOWERED,
    PART_INT8,
    dequantized,
    is_folded,
    is_half,
    is_partly_int8,
    widths,
)
from perceiver_export.calibration.lint_findings import QUANTIZE, Finding, Subject, lower, refused, slow
from perceiver_export.calibration.lint_operators import operators
from perceiver_export.calibration.lint_weights import shared_weights
from perceiver_export.calibration.lowering.attention import SMALLEST_HEAD, find_attentions
from perceiver_export.runtimes.engines.backend import Array

_FLOATS = (ir.DataType.FLOAT, *HALF)
_INT4 = (ir.DataType.INT4, ir.DataType.UINT4)
_MOST_AXES = 8
_FP16_TERMS = 65504
_WIDEST_OPERATOR = 256  # one more than attention of products and a softmax; 257 does not compile
_INT32 = np.iinfo(np.int32)


def _opset(subject: Subject) -> Iterator[Finding]:
    if subject.opset > subject.can.opset:
        message = f"opset {subject.opset}; {subject.can.name} reads up to {subject.can.opset}"
        fix = lower(subject) if subject.bundle else f"export it with opset {subject.can.opset}"
        if any(value.dtype in _INT4 for value in subject.graph.initializers.values()):
            message, fix = (
                f"{message}: int4 weights need 21",
                "quantize with --scheme int8-weights, or a newer TensorRT",
            )
        yield Finding("opset", "refused", "", message, fix)


def _zero_points(subject: Subject) -> Iterator[Finding]:
    for node in _quantizers(subject.graph):
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        unsigned = zero is None and node.op_type == "QuantizeLinear" and "output_dtype" not in node.attributes
        if unsigned or (zero is not None and zero.dtype == ir.DataType.UINT8):
            yield refused("uint8", node, "8-bit integers are unsigned; TensorRT takes int8 only", QUANTIZE)
        elif zero is not None and (array := _inline(zero)) is not None and np.any(array.astype(np.int32)):
            yield refused("zero-point", node, "its zero point is not 0; TensorRT takes symmetric int8 only", QUANTIZE)


def _integer_bias(subject: Subject) -> Iterator[Finding]:
    for node in _quantizers(subject.graph):
        if node.op_type == "DequantizeLinear" and node.inputs[0] and node.inputs[0].dtype == ir.DataType.INT32:
            yield refused("int32-bias", node, "it dequantizes int32, a bias; TensorRT refuses that", QUANTIZE)


def _scale_types(subject: Subject) -> Iterator[Finding]:
    weak = subject.can.typing == "weak"
    for node in _quantizers(subject.graph):
        scale = node.inputs[1]
        if scale is None or scale.dtype is None:
            continue
        if weak and scale.dtype in HALF:
            yield refused("scale-type", node, f"{subject.can.name} takes fp32 scales only", lower(subject))
        source = node.inputs[0]
        if node.op_type == "QuantizeLinear" and source and source.dtype in _FLOATS and source.dtype != scale.dtype:
            names = f"{_name(source.dtype)} with a scale of {_name(scale.dtype)}"
            yield refused("scale-type", node, f"it quantizes {names}; they must be the same", lower(subject))


def _pairs_of_scales(subject: Subject) -> Iterator[Finding]:
    if subject.can.library != "tensorrt-rtx":  # measured there, on 1.7.1
        return
    known: dict[ir.Value | None, set[ir.DataType]] = {}
    for node in subject.graph:
        sides = [dequantized(value) for value in node.inputs[:2]] if node.op_type in ("MatMul", "Gemm") else []
        integers = [side for side in sides if side is not None]
        if len(integers) < 2:
            continue
        types = known.setdefault(integers[0].inputs[0], set())
        types |= {side.inputs[1].dtype for side in integers if side.inputs[1] and side.inputs[1].dtype}
        if len(types) > 1:
            names = " and ".join(sorted(map(_name, types)))
            message = f"it, and products that read the same tensor, have integers with scales of {names}"
            yield refused("scale-type", node, message, lower(subject))


def _half_in_weak(subject: Subject) -> Iterator[Finding]:
    if subject.can.typing != "weak":
        return
    for node in subject.graph:
        if any(value.dtype in HALF for value in node.outputs):
            message = f"the graph is 16 bits wide; {subject.can.name} wants fp32 and takes precision from flags"
            yield refused("types", node, message, lower(subject))
            return


def _int64(subject: Subject) -> Iterator[Finding]:
    """Ends of a Slice are often the largest number there is, and mean the same when cut off."""
    if subject.can.typing != "weak":
        return
    for value in subject.graph.initializers.values():
        array = _inline(value) if value.dtype == ir.DataType.INT64 else None
        if array is None or not array.size or all(node.op_type == "Slice" for node in value.consumers()):
            continue
        if array.min() < _INT32.min or array.max() > _INT32.max:
            message = f"{value.name} has integers beyond 32 bits, to which {subject.can.name} cuts them off"
            yield Finding("int64", "refused", value.name or "", message, "keep integers within 32 bits in the model")


def _weight_axis(subject: Subject) -> Iterator[Finding]:
    for node in _quantizers(subject.graph):
        scale, weight = node.inputs[1], node.inputs[0]
        if node.op_type != "DequantizeLinear" or scale is None or not scale.shape or weight is None or not weight.shape:
            continue
        if "block_size" in node.attributes:
            continue
        axis = node.attributes.get_int("axis", 1) % len(weight.shape)
        for product in _products(node.outputs[0]):
            if product.inputs[1] is node.outputs[0] and axis != len(weight.shape) - 1:
                yield slow("weight-axis", product, "its weight has a scale for each input: it runs in floats", QUANTIZE)


def _one_sided(subject: Subject) -> Iterator[Finding]:
    for node in subject.graph:
        if node.op_type in ("MatMul", "Gemm"):
            activation, weight = (dequantized(node.inputs[index]) for index in range(2))
            if activation and not weight and node.inputs[1] is not None and node.inputs[1].is_initializer():
                yield slow(
                    "one-sided", node, "its input is int8 and its weight is not: it runs in floating point", QUANTIZE
                )


def _partial_attention(subject: Subject) -> Iterator[Finding]:
    for attention in find_attentions(subject.graph):
        if is_partly_int8(attention):
            fix = "quantize linears only, or q, k, probabilities, v and the result"
            yield slow("partial-attention", attention.softmax, PART_INT8, fix)


def _heads(subject: Subject) -> Iterator[Finding]:
    for attention in find_attentions(subject.graph):
        if not attention.fits and attention.padded is not None:
            yield slow("heads", attention.softmax, widths(attention), lower(subject))


def _wide_heads(subject: Subject) -> Iterator[Finding]:
    for attention in find_attentions(subject.graph):
        if not (attention.fits or is_folded(attention)) and attention.padded is None and attention.rows != 1:
            fix = "nothing to do here: more heads, in training, would make them narrower"
            yield slow("wide-heads", attention.softmax, widths(attention), fix)


def _full_precision(subject: Subject) -> Iterator[Finding]:
    """Of a graph that is lowered already, lowering itself has left in fp32 what would be too coarse."""
    if subject.can.typing == "weak" or is_half(subject.graph):
        return
    for attention in find_attentions(subject.graph):
        if attention.scores.outputs[0].dtype == ir.DataType.FLOAT and attention.fits:
            yield slow("fp32-attention", attention.softmax, NOT_LOWERED, lower(subject))


def _attention_operator(subject: Subject) -> Iterator[Finding]:
    for node in subject.graph:
        if node.op_type != "Attention" or len(node.inputs) < 3 or not subject.can.attention:
            continue
        queries = node.inputs[0]
        q, k, v = (_last(node.inputs[index], node, index) for index in range(3))
        one_query = queries is not None and queries.shape is not None and queries.shape[-2:-1] == (1,)
        problem = ""
        if k is not None and v is not None and k != v:
            problem = f"keys are {k} wide and values {v}; it wants them equal"
        elif q is not None and not (one_query or SMALLEST_HEAD <= q <= _WIDEST_OPERATOR):
            problem = f"heads are {q} wide, for which it has no kernel"
        elif queries is not None and queries.dtype == ir.DataType.FLOAT and not one_query:
            problem = "it is fp32, for which it has no kernel"
        if problem:
            yield refused("attention-operator", node, problem, lower(subject))


def _dynamic(subject: Subject) -> Iterator[Finding]:
    for value in subject.graph.inputs:
        names = {str(size) for size in value.shape or () if not isinstance(size, int)} - subject.ranges
        if names:
            message = f"input {value.name} has dimensions without a range: {', '.join(sorted(names))}"
            fix = "export with --batch MIN:OPT:MAX, which gives one"
            if not subject.bundle:
                fix = "export it with fixed sizes, or build it with a profile (trtexec: --minShapes and so on)"
            yield Finding("no-profile", "refused", "", message, fix)


def _axes(subject: Subject) -> Iterator[Finding]:
    for node in subject.graph:
        if any(value.shape is not None and len(value.shape) > _MOST_AXES for value in node.outputs):
            yield refused("axes", node, f"it has more than {_MOST_AXES} axes", "reshape in two steps")


def _overflow(subject: Subject) -> Iterator[Finding]:
    for value in subject.graph.initializers.values():
        array = _inline(value) if value.dtype == ir.DataType.FLOAT16 else None
        if array is not None and not np.all(np.isfinite(array)):
            message = f"{value.name} does not fit into fp16: it became infinite"
            yield Finding("overflow", "refused", value.name or "", message, lower(subject))
    for node in subject.graph:
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "Softmax" and source is not None and source.dtype == ir.DataType.FLOAT16:
            terms = _last(source, node, 0)
            if terms is not None and terms > _FP16_TERMS:
                yield slow(
                    "overflow", node, f"it adds {terms} terms in fp16, whose largest number is less", lower(subject)
                )


RULES: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    _opset,
    operators,
    _half_in_weak,
    _int64,
    _scale_types,
    _pairs_of_scales,
    _zero_points,
    _integer_bias,
    _dynamic,
    _axes,
    _attention_operator,
    _overflow,
    _weight_axis,
    _one_sided,
    shared_weights,
    _partial_attention,
    _full_precision,
    _heads,
    _wide_heads,
)


def _quantizers(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear"))


def _products(value: ir.Value) -> Iterator[ir.Node]:
    return (node for node in value.consumers() if node.op_type in ("MatMul", "Gemm"))


def _inline(value: ir.Value) -> Array | None:
    """A constant that is in the graph itself; those in a file of weights are not read, and it may not be there."""
    tensor = value.const_value
    return None if tensor is None or isinstance(tensor, ir.ExternalTensor) else tensor.numpy()


def _last(value: ir.Value | None, node: ir.Node, index: int) -> int | None:
    """The last axis; of three-dimensional inputs of an Attention the width of one head."""
    size = value.shape[-1] if value is not None and value.shape else None
    if not isinstance(size, int):
        return None
    heads = node.attributes.get_int("q_num_heads" if index == 0 else "kv_num_heads", 1)
    return size // heads if node.op_type == "Attention" and len(value.shape or ()) == 3 else size  # type: ignore[union-attr]


def _name(dtype: ir.DataType) -> str:
    return str(dtype.name).lower()
