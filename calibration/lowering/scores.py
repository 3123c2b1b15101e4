# SPDX-License-Identifier: Apache-2.0
"""Attention scores that 16 bits are too coarse for, and the nodes that make them, in plain and in folded graphs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

# fp16 resolves 1/16 at 64 and 1/2 at 600: a probability is off by as much, so scores beyond this are not rounded.
LARGEST_SCORE = 64.0
# What scores are computed with, back to the normalised or given numbers that they start from. Folded attention divides
# scores by a deviation of its inputs, and adds its logarithm: squares, roots and sums belong to them too.
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Log", "Identity", "Cast"})
_SUMS = frozenset({"MatMul", "ReduceSum", "ReduceMean"})
_MOVES = frozenset(
    {
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Expand", "Pad", "Gather"),
        *("GatherND", "CastLike"),
    }
)
_MAKE_SCORES = _ELEMENTWISE | _SUMS | _MOVES
# What lies between the products that scores are sums of and the softmax.
_TERMS = frozenset({"Add", "Sub", "Mul", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Concat", "Expand"})


def large_scores(graph: ir.Graph, hazards: Mapping[str, float], masked: set[ir.Value]) -> dict[str, str]:
    """Names of each softmax whose scores are large, and of all that makes them, with the reason.

    ``masked`` are mask constants and what is computed from them, whose size says nothing. The numbers that scores
    start from are those behind a LayerNorm, or the graph's inputs. An int8 linear is left as it is: its own steps are
    coarser than what fp16 would cost.
    """
    kept: dict[str, str] = {}
    for softmax in graph:
        if softmax.op_type != "Softmax" or softmax.inputs[0] is None:
            continue
        most = _largest_term(softmax.inputs[0], hazards, masked)
        if most > LARGEST_SCORE:
            kept |= {node.name or "": f"its scores reach {most:.3g}" for node in (softmax, *_makers(softmax))}
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
    """The largest |x| of a constant, or the one seen; 0 where nobody saw it."""
    if value.const_value is not None:
        array = value.const_value.numpy()
        return float(np.max(np.abs(array))) if array.size else 0.0
    return hazards.get(value.name or "", 0.0)


def _makers(softmax: ir.Node) -> set[ir.Node]:
    found: set[ir.Node] = set()
    pending: list[ir.Node] = [softmax]
    while pending:
        producers = (value.producer() for value in pending.pop().inputs if value is not None)
        added = [one for one in producers if one is not None and one not in found and _makes_scores(one)]
        found.update(added)
        pending += added
    return found


def _makes_scores(node: ir.Node) -> bool:
    if node.op_type == "MatMul":
        sources = (value.producer() for value in node.inputs if value is not None)
        return not any(source is not None and source.op_type == "DequantizeLinear" for source in sources)
    return node.op_type in _MAKE_SCORES
