# SPDX-License-Identifier: Apache-2.0
"""`lint()`: find problems in a graph that would make a TensorRT build fail or its engine slow or wrong, without a GPU.

Each rule was verified on TensorRT for RTX 1.7.1, the only version available: a minimal graph that breaks the rule does
not compile, or loses its fused attention or its int8 product (tests/calibration/test_lint.py). The operators that no
version supports are those of ONNX 1.23 that its parser does not know (`OnnxParser.supports_operator`) and that
NVIDIA's operators.md of 8.4 and 10.15 do not list. The builder reports other problems itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx.defs
import onnx_ir as ir

from perceiver_export.calibration.graphs import array_of, dims, is_constant, leads_to, made_by, reached, read_graph
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
# The first version of `tensorrt` with each operator; TensorRT for RTX has them all.
SINCE = {"Attention": (10, 14), "RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15), "TensorScatter": (10, 15)}
# Operators that TensorRT reads although they are not in ONNX.
MORE = frozenset({"GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "SimplifiedLayerNormalization"})

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FP16_TERMS = 65504
_PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum"})
_DEQUANTIZE = frozenset({"DequantizeLinear"})
_SHAPES = frozenset({"Transpose", "Reshape", "Pad", "Slice", "Cast"})
# Operators between a softmax and the products before and after it, in any form of attention.
_BETWEEN = _SHAPES | {
    *("Add", "Sub", "Mul", "Div", "CastLike", "Squeeze", "Unsqueeze", "Concat", "Expand", "Split"),
    *("ReduceSum", "QuantizeLinear", "DequantizeLinear"),
}
# Operators on constants that are computed when the engine is built; the engine stores their result.
_FOLDED_AWAY = _DEQUANTIZE | {"Cast", "Transpose", "Reshape", "Identity", "Pad"}

FOLDED = "it is folded: it multiplies inputs and constants instead of queries, keys and values"
ONE_QUERY = "it has one query: products with a vector need no fused kernel"
FP32 = "it is fp32: the fused kernel takes 16 bits, which are too coarse for scores this large"
NOT_LOWERED = "it is fp32: the fused kernel takes 16 bits"
PART_INT8 = "it is int8 only in part: it runs as three kernels, with the scores in memory"
_QUANTIZE = "quantize with `perceiver-export quantize`, which writes int8 in the form that TensorRT supports"
_REPLACE = "replace it in the model with operators that TensorRT supports"


@dataclass(frozen=True)
class Finding:
    """One problem. ``refused``: the graph would not parse or compile; ``slow``: it would run without a fused kernel or
    without int8.
    """

    rule: str
    kind: Literal["refused", "slow"]
    node: str
    message: str
    fix: str


@dataclass(frozen=True)
class Lint:
    """One graph's findings.

    ``attentions`` is the number of attentions, where each piece of one computed in pieces counts. ``unfused`` has those
    that do not become one kernel, by the name of their softmax, with the reason. ``weight_bytes`` is the size of the
    graph's constants; ``bytes_each_use`` counts a constant once for every node that uses it.
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
        """The number of attentions that become one kernel."""
        return self.attentions - len(self.unfused)

    @property
    def refused(self) -> bool:
        """Whether this version would fail to compile the graph."""
        return any(finding.kind == "refused" for finding in self.findings)


@dataclass(frozen=True)
class _Subject:
    """A graph and a TensorRT version; ``lower`` is the command that rewrites the graph for it."""

    model: ir.Model
    can: Capabilities
    lower: str


def lint(
    path: str | os.PathLike[str], target: str = "tensorrt", version: str | None = None, precision: str | None = None
) -> tuple[Lint, ...]:
    """Check an ONNX file, or the graphs of a bundle that this version would get. Weights are not read.

    In a bundle, these are the graphs lowered for TensorRT (in ``precision``, or in every precision present), or the
    canonical graphs if there are none. ``version`` defaults to the newest known version.

    Raises BundleError, DeviceError if the version is unknown, and UsageError.
    """
    check_choice("target", target, tuple(NEWEST))
    if precision is not None:
        check_choice("precision", precision, get_args(Precision))
    can = capabilities(target, version or NEWEST[target])
    place = Path(path)
    command = f"perceiver-export build {{}} --target {target} --precision {precision or 'fp16'} --lower-only"
    if place.is_file() and place.suffix == ".onnx":
        fix = f"export the checkpoint to a bundle, then run {command.format('BUNDLE')}"
        return (_judge(place, can, fix),)
    bundle, fix = open_bundle(place, verify="never"), f"run {command.format(place)}"
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
        logger = logging.getLogger(common.ShapeInferencePass.__module__)
        level = logger.level
        logger.setLevel(logging.ERROR)  # its warnings come with tracebacks; the rules report a graph's problems
        try:
            common.ShapeInferencePass()(model)
        finally:
            logger.setLevel(level)
    subject = _Subject(model, can, fix)
    attentions = list(_attentions(subject))
    findings = [finding for rule in _RULES for finding in rule(subject)]
    findings += [finding for _, _, finding in attentions if finding]
    unfused = {softmax: why for softmax, why, _ in attentions if why}
    return Lint(file.name, can.name, tuple(findings), len(attentions), unfused, *_weight_bytes(model.graph))


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the graph, its subgraphs and functions."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from ir.traversal.RecursiveGraphIterator(function)


def _check_nodes(model: ir.Model, file: Path) -> None:
    """Raise BundleError if a file is not valid ONNX: it has no opset, or a node lacks an input of its operator."""
    broken = "" if model.opset_imports else "it has no opset"
    for node in _nodes(model):
        least = onnx.defs.get_schema(node.op_type).min_input if onnx.defs.has(node.op_type) else 0
        if node.domain:  # an operator of the same name in another domain may take fewer
            least = min(least, 2)
        if len(node.inputs) < least or not node.outputs:
            broken = f"{node.name or node.op_type} has {len(node.inputs)} inputs and {len(node.outputs)} outputs"
    if broken:
        raise BundleError(f"{file} is not valid ONNX: {broken}", "copy or export it again")


def _attentions(subject: _Subject) -> Iterator[tuple[str, str, Finding | None]]:
    """Every attention by its softmax's name, why it is not one kernel (empty if it is), and the finding for that."""
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
    """Reason, rule and fix; the rule is empty if nothing can be done."""
    if attention.rows == 1:
        return ONE_QUERY, "", ""
    if _is_folded(attention):
        return FOLDED, "", ""
    if not attention.fits:
        widths = (
            f"its heads have width {attention.qk or '?'} for queries and keys, {attention.v or '?'} for values; one"
            f" kernel needs equal widths from {SMALLEST_HEAD} to {LARGEST_HEAD}"
        )
        if attention.padded is not None:
            return widths, "heads", lower
        return widths, "wide-heads", "train a model with more, narrower heads"
    sides = [_dequantized(value) for value in (*attention.scores.inputs[:2], *attention.read.inputs[:2])]
    output = any(user.op_type == "QuantizeLinear" for user in attention.read.outputs[0].consumers())
    if any(sides) and not (all(sides) and output):
        return PART_INT8, "partial-attention", "quantize only linear layers, or q, k, probabilities, v and the result"
    if attention.scores.outputs[0].dtype == ir.DataType.FLOAT:
        # In a lowered graph, lowering has kept it in fp32.
        return (FP32, "", "") if half else (NOT_LOWERED, "fp32-attention", lower)
    return "", "", ""


def _is_folded(attention: Attention) -> bool:
    """Whether scores are multiplied by a value that depends on the inputs, such as a folded LayerNorm's deviation."""
    between = reached(attention.softmax.inputs, lambda node: node is not attention.scores and node.op_type in _BETWEEN)
    return any(
        node.op_type in ("Mul", "Div")
        and not any(is_constant(value) or made_by(value, "Constant") for value in node.inputs)
        for node, is_between in between.items()
        if is_between
    )


def _dequantized(value: ir.Value | None) -> bool:
    """Whether a value comes from integers through nodes that only reshape or cast it."""
    return leads_to([value], _SHAPES, _DEQUANTIZE)


def _finding(rule: str, kind: Literal["refused", "slow"], node: ir.Node, message: str, fix: str) -> Finding:
    return Finding(rule, kind, node.name or node.op_type, message, fix)


def _opset(subject: _Subject) -> Iterator[Finding]:
    opset, can = subject.model.opset_imports.get("", 0), subject.can
    if opset > can.opset:
        message, fix = f"opset {opset}, but {can.name} reads up to {can.opset}", f"export it with opset {can.opset}"
        if any(value.dtype == ir.DataType.INT4 for value in subject.model.graph.initializers.values()):
            message += ", and int4 weights need 21"
            fix = "quantize with --scheme int8-weights, or install a newer TensorRT"
        yield Finding("opset", "refused", "", message, fix)


def _operators(subject: _Subject) -> Iterator[Finding]:
    """Operators that the version does not support.

    Parsers use an operator's name and ignore its domain, and search plugins for unknown names.
    """
    calls, can = {function.name for function in subject.model.functions.values()}, subject.can
    for node in _nodes(subject.model):
        operator, message, fix = node.op_type, "", _REPLACE
        since = SINCE.get(operator, (0, 0)) if can.library == "tensorrt" else (0, 0)
        if operator in NEVER:
            message = f"no version of TensorRT supports {operator}"
            fix = _QUANTIZE if operator in _INTEGER else _REPLACE
        elif can.version < since:
            message = f"{can.name} does not support {operator}; the first version that does is {since[0]}.{since[1]}"
        elif not (onnx.defs.has(operator) or operator in MORE or "TRT" in operator):
            message = f"{operator} is not an ONNX operator, so TensorRT needs a plugin for it"
        if message and operator not in calls:
            yield _finding("operator", "refused", node, message, fix)


def _symmetric(subject: _Subject) -> Iterator[Finding]:
    """Integers other than symmetric int8. TensorRT for RTX 1.7 warns about some uint8 and computes wrong values."""
    for node in subject.model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        unsigned = zero is None and node.op_type == "QuantizeLinear" and "output_dtype" not in node.attributes
        array, message = _inline(zero), ""
        if unsigned or (zero is not None and zero.dtype == ir.DataType.UINT8):
            message = "its integers are unsigned, but TensorRT supports only int8"
        elif array is not None and np.any(array.astype(np.int32)):
            message = "its zero point is not 0, but TensorRT supports only symmetric int8"
        if message:
            yield _finding("symmetric", "refused", node, message, _QUANTIZE)


def _float_products(subject: _Subject) -> Iterator[Finding]:
    """Products with one int8 operand, or with an int8 weight that has one scale per input."""
    for node in subject.model.graph:
        if node.op_type not in ("MatMul", "Gemm") or (weight := node.inputs[1]) is None:
            continue
        if weight.is_initializer() and _dequantized(node.inputs[0]):
            message = "its input is int8 but its weight is not, so it runs in float"
            yield _finding("one-sided", "slow", node, message, _QUANTIZE)
        elif (made := made_by(weight, "DequantizeLinear")) and _scales_inputs(made):
            message = "its weight has one scale per input, so it runs in float"
            yield _finding("weight-axis", "slow", node, message, _QUANTIZE)


def _scales_inputs(node: ir.Node) -> bool:
    rank, scales = (len(dims(value)) for value in node.inputs[:2])
    by_axis = rank > 0 and scales > 0 and "block_size" not in node.attributes
    return by_axis and node.attributes.get_int("axis", 1) % rank != rank - 1


def _shared_weights(subject: _Subject) -> Iterator[Finding]:
    """Products of one float input with integer weights that later blocks reuse, which crash the compiler."""
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
    cast = made_by(weight, "Cast")  # if the weight's scale is too small for 16 bits and stays fp32
    source = made_by(cast.inputs[0] if cast else weight, "DequantizeLinear")
    stored = source.inputs[0] if source else None
    if weight is None or stored is None or not stored.is_initializer() or _dequantized(product.inputs[0]):
        return False
    return len(weight.uses()) > 1 and (stored.dtype, weight.dtype) != (ir.DataType.INT8, ir.DataType.BFLOAT16)


def _overflow(subject: _Subject) -> Iterator[Finding]:
    for value in subject.model.graph.initializers.values():
        array = _inline(value) if value.dtype == ir.DataType.FLOAT16 else None
        if array is not None and not np.all(np.isfinite(array)):
            message = f"{value.name} is infinite in fp16"
            yield Finding("overflow", "refused", value.name or "", message, subject.lower)
    for node in subject.model.graph:
        source = node.inputs[0] if node.op_type == "Softmax" else None
        terms = (dims(source) or (1,))[-1]
        if source and source.dtype == ir.DataType.FLOAT16 and terms > _FP16_TERMS:
            message = f"it adds {terms} terms in fp16, more than its largest number"
            yield _finding("overflow", "slow", node, message, subject.lower)


def _inline(value: ir.Value | None) -> np.ndarray | None:
    """A constant stored in the graph itself. Weight files are not read and may be missing."""
    return array_of(value) if is_constant(value) and not isinstance(value.const_value, ir.ExternalTensor) else None


_RULES = (_opset, _operators, _symmetric, _overflow, _shared_weights, _float_products)


def _weight_bytes(graph: ir.Graph) -> tuple[int, int]:
    """Bytes of all constants, first each counted once, then once for each node that uses it.

    TensorRT for RTX stores constants once (tests/benchmarks/tensorrt_shared_weights.py); for TensorRT it is unknown.
    """
    sizes = {value: one.nbytes for value in graph.initializers.values() if (one := value.const_value) is not None}
    return sum(sizes.values()), sum(size * _uses(value) for value, size in sizes.items())


def _uses(value: ir.Value) -> int:
    return sum(_uses(node.outputs[0]) if node.op_type in _FOLDED_AWAY else 1 for node, _ in value.uses())
