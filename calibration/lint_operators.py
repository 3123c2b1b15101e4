# SPDX-License-Identifier: Apache-2.0
"""Which operators a version of TensorRT has no parser for.

Those that no version has are what the parser of TensorRT for RTX 1.7.1 says of every operator of ONNX 1.23
(`OnnxParser.supports_operator`), and what NVIDIA's operators.md of 8.4 and 10.15 say as well. When the others came is
NVIDIA's documentation, and the layers in the bindings of each version.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from perceiver_export.calibration.lint_findings import QUANTIZE, Finding, Subject, lower, refused

_INTEGER = frozenset({"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
NEVER = _INTEGER | frozenset(
    {
        *("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"),
        *("CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "DFT", "Det", "ImageDecoder", "MaxRoiPool"),
        *("MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional"),
        *("OptionalGetElement", "OptionalHasElement", "RegexFullMatch", "SequenceAt", "SequenceConstruct"),
        *("SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap"),
        *("SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit"),
        *("TfIdfVectorizer", "Unique"),
    }
)
# The first version of `tensorrt`; TensorRT for RTX has them.
SINCE = {"Attention": (10, 14), "RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15), "TensorScatter": (10, 15)}
# Not of ONNX, and read all the same.
MORE = frozenset({"GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "SimplifiedLayerNormalization"})
_REPLACE = "replace it in the model, with operators that TensorRT has"


def operators(subject: Subject) -> Iterator[Finding]:
    """Nodes, those of inner graphs and of functions too, that the version would not read.

    Parsers go by an operator's name and not by its domain; one that they do not know, they look for among plugins.
    """
    calls = {function.name for function in subject.functions}
    for node in _nodes(subject):
        operator, can = node.op_type, subject.can
        since = SINCE.get(operator, (0, 0)) if can.library == "tensorrt" else (0, 0)
        if operator in calls:
            continue
        if operator in NEVER:
            fix = QUANTIZE if operator in _INTEGER else _REPLACE
            yield refused("operator", node, f"{operator} is in no version of TensorRT", fix)
        elif operator == "Gelu" and not can.gelu:
            yield refused("operator", node, f"{can.name} has no Gelu", lower(subject))
        elif can.version < since:
            first = f"{since[0]}.{since[1]} is the first"
            yield refused("operator", node, f"{can.name} has no {operator}; {first}", _REPLACE)
        elif not (onnx.defs.has(operator) or operator in MORE or "TRT" in operator):
            yield refused("operator", node, f"{operator} is no operator of ONNX, at most a plugin", _REPLACE)


def _nodes(subject: Subject) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(subject.graph)
    for function in subject.functions:
        yield from ir.traversal.RecursiveGraphIterator(function)
