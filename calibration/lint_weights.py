# SPDX-License-Identifier: Apache-2.0
"""How large a graph's weights are, once and for each use: between the two lies an engine, before it is built."""

from __future__ import annotations

import math

import onnx_ir as ir

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
