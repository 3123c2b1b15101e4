# SPDX-License-Identifier: Apache-2.0
"""`lint()`: what would make a TensorRT build fail, slow or wrong, read from the graph without a GPU.

Each rule was seen to hold on TensorRT for RTX 1.7.1, the only version that could be asked: a minimal graph that breaks
it does not compile, or loses its fused attention or its int8 product (tests/calibration/test_lint.py). Operators that
no version has are those of ONNX 1.23 that its parser does not know (`OnnxParser.supports_operator`), and that NVIDIA's
operators.md of 8.4 and 10.15 do not list either. The builder reports the rest itself.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx.defs
import onnx_ir as ir

from perceiver_export.calibration.graphs import array_of, is_constant, leads_to, made_by, reached, read_graph
from perceiver_export.calibration.lowering.attention import LARGEST_HEAD, SMALLEST_HEAD, Attention, find_attentions
from perceiver_export.runtimes.bundle import open_bundle
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.engines.tensorrt_layers import SHARED_WEIGHTS, SHARED_WEIGHTS_FIX
from perceiver_export.runtimes.engines.tensorrt_versions import NEWEST, Capabilities, capabilities
from perceiver_export.runtimes.errors import BundleError, UsageError, check_choice

_INTEGER = frozenset({"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
NEVER = _INTEGER | {
    *("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad"),
    *("Col2Im", "Compress", "ConcatFromSequence", "DFT", "Det", "ImageDecoder", "MaxRoiPool", "MaxUnpool"),
    *("MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement"),
    *("OptionalHasElement", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase"),
    *("SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat"),
    *("StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique"),
}
# The first version of `tensorrt`; TensorRT for RTX has them.
SINCE = {"Attention": (10, 14), "RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15), "TensorScatter": (10, 15)}
# Read, though not of ONNX.
MORE = frozenset({"GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "SimplifiedLayerNormalization"})

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FP16_TERMS = 65504
_PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum"})
_DEQUANTIZE = frozenset({"DequantizeLinear"})
_SHAPES = frozenset({"Transpose", "Reshape", "Pad", "Slice", "Cast"})
# Operators between a softmax and the products before and behind it, in attention of any form.
_BETWEEN = _SHAPES | {
    *("Add", "Sub", "Mul", "Div", "CastLike", "Squeeze", "Unsqueeze", "Concat", "Expand", "Split"),
    *("ReduceSum", "QuantizeLinear", "DequantizeLinear"),
}
# Computed when the engine is built: the engine stores their result.
_FOLDED_AWAY = _DEQUANTIZE | {"Cast", "Transpose", "Reshape", "Identity", "Pad"}

FOLDED = "folded: inputs and constants are multiplied in it, no queries, keys and values"
ONE_QUERY = "one query: products with a vector, which need no kernel of their own"
FP32 = "fp32: a kernel takes 16 bits, in which scores this large would be too coarse"
NOT_LOWERED = "fp32: a kernel takes 16 bits"
PART_INT8 = "part of it is int8: one kernel becomes three, with the scores in memory"
_QUANTIZE = "quantize with `perceiver-export quantize`, which writes the int8 that TensorRT takes"
_REPLACE = "replace it in the model with operators that TensorRT has"


@dataclass(frozen=True)
class Finding:
    """``refused``: it would not parse or compile; ``slow``: it would run without a fused kernel or without int8."""

    rule: str
    kind: Literal["refused", "slow"]
    node: str
    message: str
    fix: str


@dataclass(frozen=True)
class Lint:
    """One graph's findings. ``attentions``: how many it has, in as many pieces as it computes them in; ``unfused``:
    those that do not become one kernel, by the name of their softmax, each with the reason. ``weight_bytes``: size of
    the graph's constants; ``bytes_each_use``: the same if an engine had a copy for every node that uses one.
    """

    graph: str
    version: str
    findings: tuple[Finding, ...]
    attentions: int
    unfused: dict[str, str]
    weight_bytes: int
    bytes_each_use: int

    @property
    def fusable(self) -> int:
        """How many attentions become one kernel."""
        return self.attentions - len(self.unfused)

    @property
    def refused(self) -> bool:
        """Whether this version would not compile it."""
        return any(finding.kind == "refused" for finding in self.findings)


@dataclass(frozen=True)
class _Subject:
    """A graph, for a version; ``lower`` tells how to rewrite it for that."""

    model: ir.Model
    can: Capabilities
    lower: str


def lint(
    path: str | os.PathLike[str], target: str = "tensorrt", version: str | None = None, precision: str | None = None
) -> tuple[Lint, ...]:
    """Judge the graphs of a bundle that this version would get, or an ONNX file. Weights are not read.

    Of a bundle: the graphs that were lowered for TensorRT (in ``precision``, or in every one that is there), else the
    canonical ones. ``version`` defaults to the newest that is known.

    Raises BundleError, DeviceError (no such version), UsageError.
    """
    check_choice("target", target, tuple(NEWEST))
    if precision is not None:
        check_choice("precision", precision, get_args(Precision))
    can = capabilities(target, version or NEWEST[target])
    place = Path(path)
    command = f"perceiver-export build {{}} --target {target} --precision {precision or 'fp16'} --lower-only"
    if place.is_file() and place.suffix == ".onnx":
        fix = f"only graphs of bundles can be rewritten: export the checkpoint, then {command.format('BUNDLE')}"
        return (_judge(place, can, fix),)
    bundle, fix = open_bundle(place, verify="never"), command.format(place)
    found = []
    for part in bundle.manifest.parts.values():
        lowered = {
            key.removeprefix("tensorrt-"): file for key, file in part.lowered.items() if key.startswith("tensorrt-")
        }
        if precision is not None and precision not in lowered and (lowered or precision != "fp32"):
            raise UsageError(f"{path} has no {precision} graph for {can.name}", fix)
        files = [lowered[precision]] if precision in lowered else list(lowered.values())
        found += [_judge(bundle.file(file), can, fix) for file in files or [part.file]]
    return tuple(found)


def _judge(file: Path, can: Capabilities, fix: str) -> Lint:
    import onnx_ir.passes.common as common

    model = read_graph(file)
    _check_nodes(model, file)
    if any(value.shape is None or value.dtype is None for node in model.graph for value in node.outputs):
        with _quiet(common.ShapeInferencePass.__module__):
            common.ShapeInferencePass()(model)
    subject = _Subject(model, can, fix)
    attentions = list(_attentions(subject))
    findings = [finding for rule in _RULES for finding in rule(subject)]
    findings += [finding for _, _, finding in attentions if finding]
    unfused = {softmax: why for softmax, why, _ in attentions if why}
    return Lint(file.name, can.name, tuple(findings), len(attentions), unfused, *_weight_bytes(model.graph))


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes of the graph, and those of inner graphs and functions."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from ir.traversal.RecursiveGraphIterator(function)


def _check_nodes(model: ir.Model, file: Path) -> None:
    """Raise BundleError where a file is not valid ONNX: it names no opset, or a node lacks an input of its operator."""
    broken = "" if model.opset_imports else "it names no opset"
    for node in _nodes(model):
        least = onnx.defs.get_schema(node.op_type).min_input if onnx.defs.has(node.op_type) else 0
        if node.domain:  # another operator of that name may take fewer
            least = min(least, 2)
        if len(node.inputs) < least or not node.outputs:
            broken = f"{node.name or node.op_type} has {len(node.inputs)} inputs and {len(node.outputs)} outputs"
    if broken:
        raise BundleError(f"{file} is not valid ONNX: {broken}", "copy or export it again")


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without a library's warnings, which come with traces: the rules name the faults of a graph."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _attentions(subject: _Subject) -> Iterator[tuple[str, str, Finding | None]]:
    """Every attention by its softmax's name, why it is not one kernel (empty where it is), and the finding of that."""
    graph = subject.model.graph
    half = any(value.dtype in _HALF for node in graph for value in node.outputs)
    known = {one.softmax: one for one in find_attentions(graph)}
    for node in graph:
        name = node.name or node.op_type
        if node in known:
            why, rule, fix = _why_unfused(known[node], half, subject.lower)
            yield name, why, Finding(rule, "slow", name, why, fix) if rule else None
        elif node.op_type == "Softmax":
            before = leads_to(node.inputs, _BETWEEN, _PRODUCTS)
            if before and leads_to(node.outputs, _BETWEEN, _PRODUCTS, forward=True):
                yield name, FOLDED, None


def _why_unfused(attention: Attention, half: bool, lower: str) -> tuple[str, str, str]:
    """Reason, rule and fix; no rule where nothing can be done."""
    if attention.rows == 1:
        return ONE_QUERY, "", ""
    if _is_folded(attention):
        return FOLDED, "", ""
    if not attention.fits:
        widths = (
            f"its heads are {attention.qk or '?'} wide for queries and keys, {attention.v or '?'} for values; attention"
            f" is one kernel where they are equal, from {SMALLEST_HEAD} to {LARGEST_HEAD}"
        )
        if attention.padded is not None:
            return widths, "heads", lower
        return widths, "wide-heads", "nothing to do here: more heads, in training, would make them narrower"
    sides = [_dequantized(value) for value in (*attention.scores.inputs[:2], *attention.read.inputs[:2])]
    output = any(user.op_type == "QuantizeLinear" for user in attention.read.outputs[0].consumers())
    if any(sides) and not (all(sides) and output):
        return PART_INT8, "partial-attention", "quantize linears only, or q, k, probabilities, v and the result"
    if attention.scores.outputs[0].dtype == ir.DataType.FLOAT:
        # Lowering itself has left it in fp32, if the graph is lowered.
        return (FP32, "", "") if half else (NOT_LOWERED, "fp32-attention", lower)
    return "", "", ""


def _is_folded(attention: Attention) -> bool:
    """Whether scores are multiplied by something that changes with the inputs, as a folded LayerNorm's deviations."""
    between = reached(attention.softmax.inputs, lambda node: node is not attention.scores and node.op_type in _BETWEEN)
    return any(
        node.op_type in ("Mul", "Div")
        and not any(is_constant(value) or made_by(value, "Constant") for value in node.inputs)
        for node, is_between in between.items()
        if is_between
    )


def _dequantized(value: ir.Value | None) -> bool:
    """Whether a value is made of integers, past nodes that only shape or cast it."""
    return leads_to([value], _SHAPES, _DEQUANTIZE)


def _finding(rule: str, kind: Literal["refused", "slow"], node: ir.Node, message: str, fix: str) -> Finding:
    return Finding(rule, kind, node.name or node.op_type, message, fix)


def _opset(subject: _Subject) -> Iterator[Finding]:
    opset, can = subject.model.opset_imports.get("", 0), subject.can
    if opset > can.opset:
        message, fix = f"opset {opset}; {can.name} reads up to {can.opset}", f"export it with opset {can.opset}"
        if any(value.dtype == ir.DataType.INT4 for value in subject.model.graph.initializers.values()):
            message, fix = (
                f"{message}: int4 weights need 21",
                "quantize with --scheme int8-weights, or a newer TensorRT",
            )
        yield Finding("opset", "refused", "", message, fix)


def _operators(subject: _Subject) -> Iterator[Finding]:
    """Operators that the version does not read.

    Parsers go by an operator's name and not by its domain, and look for unknown ones among plugins.
    """
    calls, can = {function.name for function in subject.model.functions.values()}, subject.can
    for node in _nodes(subject.model):
        operator, message, fix = node.op_type, "", _REPLACE
        since = SINCE.get(operator, (0, 0)) if can.library == "tensorrt" else (0, 0)
        if operator in NEVER:
            message, fix = f"{operator} is in no version of TensorRT", _QUANTIZE if operator in _INTEGER else _REPLACE
        elif can.version < since:
            message = f"{can.name} has no {operator}; {since[0]}.{since[1]} is the first"
        elif not (onnx.defs.has(operator) or operator in MORE or "TRT" in operator):
            message = f"{operator} is no operator of ONNX, at most a plugin"
        if message and operator not in calls:
            yield _finding("operator", "refused", node, message, fix)


def _symmetric(subject: _Subject) -> Iterator[Finding]:
    """Only symmetric int8: TensorRT for RTX 1.7 merely warns of some uint8, and computes other numbers."""
    for node in subject.model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        unsigned = zero is None and node.op_type == "QuantizeLinear" and "output_dtype" not in node.attributes
        array = None if zero is None else _inline(zero)
        if unsigned or (zero is not None and zero.dtype == ir.DataType.UINT8):
            yield _finding(
                "symmetric", "refused", node, "its integers are unsigned; TensorRT takes int8 only", _QUANTIZE
            )
        elif array is not None and np.any(array.astype(np.int32)):
            message = "its zero point is not 0; TensorRT takes symmetric int8 only"
            yield _finding("symmetric", "refused", node, message, _QUANTIZE)


def _float_products(subject: _Subject) -> Iterator[Finding]:
    """Products with one int8 side, or whose int8 weight has a scale for each input."""
    for node in subject.model.graph:
        if node.op_type not in ("MatMul", "Gemm") or (weight := node.inputs[1]) is None:
            continue
        if weight.is_initializer() and _dequantized(node.inputs[0]):
            message = "its input is int8 and its weight is not: it runs in floats"
            yield _finding("one-sided", "slow", node, message, _QUANTIZE)
        elif (made := made_by(weight, "DequantizeLinear")) and _scales_inputs(made):
            message = "its weight has a scale for each input: it runs in floats"
            yield _finding("weight-axis", "slow", node, message, _QUANTIZE)


def _scales_inputs(node: ir.Node) -> bool:
    weight, scale = node.inputs[:2]
    if "block_size" in node.attributes or weight is None or scale is None or not weight.shape or not scale.shape:
        return False
    return node.attributes.get_int("axis", 1) % len(weight.shape) != len(weight.shape) - 1


def _shared_weights(subject: _Subject) -> Iterator[Finding]:
    """Products of one float input with integer weights that later blocks use again: the compiler crashes."""
    for node in subject.model.graph if subject.can.shared_weights_crash else ():
        for value in node.outputs:
            shared = {
                product.inputs[1]: product
                for product in value.consumers()
                if product.op_type == "MatMul" and product.inputs[0] is value and _is_shared(product)
            }
            for product in shared.values() if len(shared) > 1 else ():
                yield _finding("shared-weights", "refused", product, SHARED_WEIGHTS, SHARED_WEIGHTS_FIX)


def _is_shared(product: ir.Node) -> bool:
    weight = product.inputs[1]
    cast = made_by(weight, "Cast")  # of weights whose scale is too small for 16 bits, and stays fp32
    source = made_by(cast.inputs[0] if cast else weight, "DequantizeLinear")
    stored = source.inputs[0] if source else None
    if weight is None or stored is None or not stored.is_initializer() or _dequantized(product.inputs[0]):
        return False
    return len(weight.uses()) > 1 and (stored.dtype, weight.dtype) != (ir.DataType.INT8, ir.DataType.BFLOAT16)


def _overflow(subject: _Subject) -> Iterator[Finding]:
    for value in subject.model.graph.initializers.values():
        array = _inline(value) if value.dtype == ir.DataType.FLOAT16 else None
        if array is not None and not np.all(np.isfinite(array)):
            message = f"{value.name} does not fit into fp16: it became infinite"
            yield Finding("overflow", "refused", value.name or "", message, subject.lower)
    for node in subject.model.graph:
        source = node.inputs[0] if node.op_type == "Softmax" else None
        terms = source.shape[-1] if source is not None and source.shape else None
        if source and source.dtype == ir.DataType.FLOAT16 and isinstance(terms, int) and terms > _FP16_TERMS:
            message = f"it adds {terms} terms in fp16, whose largest number is smaller"
            yield _finding("overflow", "slow", node, message, subject.lower)


def _inline(value: ir.Value) -> np.ndarray | None:
    """A constant that is in the graph itself. A file of weights is not read, and may not be there."""
    return array_of(value) if is_constant(value) and not isinstance(value.const_value, ir.ExternalTensor) else None


_Rule = Callable[[_Subject], Iterator[Finding]]
_RULES: tuple[_Rule, ...] = (_opset, _operators, _symmetric, _overflow, _shared_weights, _float_products)


def _weight_bytes(graph: ir.Graph) -> tuple[int, int]:
    """Bytes of all constants stored once, and with a copy for each node that uses one.

    TensorRT for RTX stores them once (tests/benchmarks/tensorrt_shared_weights.py); of others it is not known.
    """
    once = each = 0
    for value in graph.initializers.values():
        if value.dtype is not None and value.shape is not None:
            size = math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)
            once, each = once + size, each + size * _uses(value)
    return once, each


def _uses(value: ir.Value) -> int:
    return sum(_uses(node.outputs[0]) if node.op_type in _FOLDED_AWAY else 1 for node, _ in value.uses())
