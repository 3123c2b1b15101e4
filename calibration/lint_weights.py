# SPDX-License-Identifier: Apache-2.0
"""Weights that blocks share: how large an engine is before it is built, and where TensorRT for RTX cannot build one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from perceiver_export.calibration.lint_attention import dequantized
from perceiver_export.calibration.lint_findings import Finding, Subject, refused
from perceiver_export.runtimes.engines.tensorrt_network import SHARED_WEIGHTS, SHARED_WEIGHTS_FIX

# Computed when the engine is built, so that what is stored is behind them.
_FOLDED_AWAY = frozenset({"DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity", "Pad"})


def weight_bytes(graph: ir.Graph) -> tuple[int, int]:
    """Bytes of all constants, as the graph has them: stored once, and a copy for each node that uses one.

    TensorRT for RTX stores them once (tests/benchmarks/tensorrt_shared_weights.py); of others it is not known.
    """
    once = each = 0
    for value in graph.initializers.values():
        if value.dtype is None or value.shape is None:
            continue
        size = math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)
        once += size
        each += size * _uses(value)
    return once, each


def _uses(value: ir.Value) -> int:
    return sum(_uses(node.outputs[0]) if node.op_type in _FOLDED_AWAY else 1 for node, _ in value.uses())


def shared_weights(subject: Subject) -> Iterator[Finding]:
    """Products of one input with weights that alone are integers, and that later blocks use again."""
    if not subject.can.shared_weights_crash:
        return
    for node in subject.graph:
        for value in node.outputs:
            shared = {
                product.inputs[1]: product
                for product in value.consumers()
                if product.op_type == "MatMul" and product.inputs[0] is value and _is_shared(product)
            }
            if len(shared) > 1:
                for product in shared.values():
                    yield refused("shared-weights", product, SHARED_WEIGHTS, SHARED_WEIGHTS_FIX)


def _is_shared(product: ir.Node) -> bool:
    weight = product.inputs[1]
    source = weight.producer() if weight is not None else None
    if source is not None and source.op_type == "Cast" and source.inputs[0] is not None:
        source = source.inputs[0].producer()  # a scale too small for 16 bits stays fp32, and what it makes is cast
    if weight is None or source is None or source.op_type != "DequantizeLinear" or dequantized(product.inputs[0]):
        return False
    stored = source.inputs[0]
    if stored is None or not stored.is_initializer() or len(weight.uses()) < 2:
        return False
    return not (stored.dtype == ir.DataType.INT8 and weight.dtype == ir.DataType.BFLOAT16)
