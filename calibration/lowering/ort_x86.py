# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on x86: everything that keeps its integer kernels from a canonical linear, taken out of the way.

1. Activations are uint8 with zero point 128 instead of int8 with 0. x86 kernels multiply uint8 by int8; onnxruntime
   turns int8 activations into uint8 by itself, but only where a Q has one reader, and else computes in float.
2. The bias is (1, 1, N) instead of (N): onnxruntime makes a Gemm of a MatMul with a 1-D bias, and its Gemm with a float
   bias has no integer kernel.
3. A product of rank 2 is computed in rank 3, for the same reason.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.gemm import constant, remove_unused
from perceiver_export.calibration.lowering.shapes import raise_rank_2, widen_biases


def lower(model: ir.Model) -> None:
    """Rewrite a canonical graph in place."""
    _use_uint8(model.graph)
    raise_rank_2(model.graph)
    widen_biases(model.graph)
    remove_unused(model.graph)


def _use_uint8(graph: ir.Graph) -> None:
    """q = round(x / s) becomes q + 128; DequantizeLinear takes the 128 off again, so that no number changes.

    Given:  DequantizeLinear(QuantizeLinear(x, s, int8 0), s, int8 0)
    Result: DequantizeLinear(QuantizeLinear(x, s, uint8 128), s, uint8 128)
    """
    middle: ir.Value | None = None
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or node.outputs[0].dtype != ir.DataType.INT8:
            continue
        if middle is None:
            middle = constant(graph, "uint8.zero_point", np.full((), 128, np.uint8))
        node.replace_input_with(2, middle)
        node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        for reader in node.outputs[0].consumers():
            reader.replace_input_with(2, middle)
