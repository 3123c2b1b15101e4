# SPDX-License-Identifier: Apache-2.0
"""Rewrite the canonical quantized graph so that ONNX Runtime runs it in integer kernels on x86 and ARM.

1. x86 only: activations are uint8 with zero point 128 instead of int8 with 0, because x86 kernels multiply uint8 by
   int8. onnxruntime converts int8 activations to uint8 only if a Q has one reader; otherwise it computes in float.
2. Biases are (1, 1, N) instead of (N): onnxruntime turns a MatMul with a 1-D bias into a Gemm, and a Gemm with a float
   bias has no integer kernel.
3. Products of rank 2 are computed in rank 3, for the same reason.
4. A product without a bias gets a bias of zeros before a Relu or Clip. Otherwise onnxruntime takes the Relu or Clip
   for part of the quantizer after it, and if it is not, leaves the product in float.

OpenVINO's low-precision passes accept the canonical form unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.graphs import array_of, constant, dims, is_constant, made_by, remove_unused


def _widen_biases(graph: ir.Graph) -> None:
    """Reshape the biases of quantized products to (1, 1, N).

    Given:  Add(MatMul(x, W), b of (N))
    Result: Add(MatMul(x, W), b of (1, 1, N))
    """
    widened: dict[ir.Value, ir.Value] = {}
    for node in _quantized_products(graph):
        for add in [user for user in node.outputs[0].consumers() if user.op_type == "Add"]:
            for index, bias in enumerate(add.inputs):
                if bias is not None and is_constant(bias) and len(dims(bias)) == 1:
                    if bias not in widened:
                        widened[bias] = constant(graph, f"{bias.name}.wide", array_of(bias).reshape(1, 1, -1))
                    add.replace_input_with(index, widened[bias])


def _keep_from_clips(graph: ir.Graph) -> None:
    """Insert a bias of zeros between a quantized product and a Relu or Clip.

    Given:  Relu(MatMul(x, W))
    Result: Relu(Add(MatMul(x, W), 0 of (N)))
    """
    for node in _quantized_products(graph):
        product, users = node.outputs[0], list(node.outputs[0].consumers())
        if len(users) != 1 or users[0].op_type not in ("Relu", "Clip"):
            continue
        zeros = constant(graph, f"{product.name}.zeros", np.zeros(dims(product)[-1], np.float32))
        shifted = ir.Value(name=f"{product.name}.shifted", type=product.type, shape=product.shape)
        users[0].replace_input_with(0, shifted)
        graph.insert_after(node, ir.node("Add", [product, zeros], name=f"{node.name}.shifted", outputs=[shifted]))


def _raise_rank_2(graph: ir.Graph) -> None:
    """Compute quantized products of rank 2, with their biases, in rank 3.

    Given:  y = Add(MatMul(DQ(Q(x)), W), b), x of (M, K)
    Result: y = Squeeze(Add(MatMul(DQ(Q(Unsqueeze(x))), W), b))
    """
    raised: dict[ir.Node, None] = {}
    for node in _quantized_products(graph):
        dequantize = made_by(node.inputs[0], "DequantizeLinear") if len(dims(node.inputs[0])) == 2 else None
        quantize = made_by(dequantize.inputs[0], "QuantizeLinear") if dequantize else None
        if quantize is None or (x := quantize.inputs[0]) is None:
            continue
        axis = constant(graph, "axis_0", np.array([0], np.int64))
        if quantize not in raised:
            raised[quantize] = None
            higher = ir.Value(name=f"{x.name}.rank_3", type=x.type, shape=_raised(x.shape))
            graph.insert_before(
                quantize, ir.node("Unsqueeze", [x, axis], name=f"{quantize.name}.rank_3", outputs=[higher])
            )
            quantize.replace_input_with(0, higher)
        _lower_result(graph, node, axis)
    for quantize in raised:
        for value in (quantize.outputs[0], *(out for user in quantize.outputs[0].consumers() for out in user.outputs)):
            if len(dims(value)) == 2:
                value.shape = _raised(value.shape)


def _quantized_products(graph: ir.Graph) -> list[ir.Node]:
    """The MatMuls with two dequantized operands."""
    return [
        node
        for node in graph
        if node.op_type == "MatMul" and all(made_by(value, "DequantizeLinear") for value in node.inputs[:2])
    ]


def _lower_result(graph: ir.Graph, product: ir.Node, axis: ir.Value) -> None:
    """Add a Squeeze after the product, or after its bias if nothing else reads the product."""
    last, users = product, list(product.outputs[0].consumers())
    alone = len(users) == 1 and not product.outputs[0].is_graph_output()
    if alone and users[0].op_type == "Add" and any(_is_bias(value) for value in users[0].inputs):
        product.outputs[0].shape = _raised(product.outputs[0].shape)
        last = users[0]
    result = last.outputs[0]
    squeezed = ir.Value(name=f"{result.name}.rank_2", type=result.type, shape=result.shape)
    is_output, name = result.is_graph_output(), result.name
    result.replace_all_uses_with(squeezed, replace_graph_outputs=True)
    graph.insert_after(last, ir.node("Squeeze", [result, axis], name=f"{last.name}.rank_2", outputs=[squeezed]))
    result.shape = _raised(result.shape)
    if is_output:
        result.name, squeezed.name = f"{name}.rank_3", name


def _is_bias(value: ir.Value | None) -> bool:
    return is_constant(value) and len(dims(value)) > 0 and math.prod(dims(value)) == dims(value)[-1]


def _raised(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape([1, *shape])


def lower_for_arm(model: ir.Model) -> None:
    """Rewrite a canonical graph in place."""
    _keep_from_clips(model.graph)
    _raise_rank_2(model.graph)
    _widen_biases(model.graph)
    remove_unused(model.graph)


def lower_for_x86(model: ir.Model) -> None:
    """Rewrite a canonical graph in place."""
    _use_uint8(model.graph)
    lower_for_arm(model)


def _use_uint8(graph: ir.Graph) -> None:
    """Replace q = round(x / s) by q + 128. DequantizeLinear subtracts the 128 again, so that no value changes.

    Given:  DequantizeLinear(QuantizeLinear(x, s, int8 0), s, int8 0)
    Result: DequantizeLinear(QuantizeLinear(x, s, uint8 128), s, uint8 128)
    """
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or node.outputs[0].dtype != ir.DataType.INT8:
            continue
        middle = constant(graph, "uint8.zero_point", np.full((), 128, np.uint8))
        node.replace_input_with(2, middle)
        node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        for reader in node.outputs[0].consumers():
            reader.replace_input_with(2, middle)


# By target; `-arm64` is the form for ARM CPUs.
LOWERINGS: dict[str, Callable[[ir.Model], None]] = {"ort-cpu": lower_for_x86, "ort-cpu-arm64": lower_for_arm}
