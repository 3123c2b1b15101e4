# SPDX-License-Identifier: Apache-2.0
"""What onnxruntime's rewrite of MatMul and Add to Gemm must not find: biases of one axis, and products of rank 2."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.gemm import constant


def widen_biases(graph: ir.Graph) -> None:
    """Biases of quantized products as (1, 1, N).

    Given:  Add(MatMul(x, W), b of (N))
    Result: Add(MatMul(x, W), b of (1, 1, N))
    """
    widened: dict[ir.Value, ir.Value] = {}
    for node in quantized_products(graph):
        for add in [user for user in node.outputs[0].consumers() if user.op_type == "Add"]:
            for index, bias in enumerate(add.inputs):
                if bias is None or bias.const_value is None or len(bias.const_value.shape) != 1:
                    continue
                if bias not in widened:
                    array = bias.const_value.numpy().reshape(1, 1, -1)
                    widened[bias] = constant(graph, f"{bias.name}.wide", array)
                add.replace_input_with(index, widened[bias])


def raise_rank_2(graph: ir.Graph) -> None:
    """Quantized products of rank 2, with their bias, in rank 3.

    Given:  y = Add(MatMul(DQ(Q(x)), W), b), x of (M, K)
    Result: y = Squeeze(Add(MatMul(DQ(Q(Unsqueeze(x))), W), b))
    """
    axis: ir.Value | None = None
    raised: dict[ir.Node, None] = {}
    for node in quantized_products(graph):
        left = node.inputs[0]
        if left is None or left.shape is None or len(left.shape) != 2 or left.producer() is None:
            continue
        axis = axis or constant(graph, "axis_0", np.array([0], np.int64))
        dequantize = left.producer()
        quantize = dequantize.inputs[0].producer() if dequantize is not None and dequantize.inputs[0] else None
        if quantize is None or quantize.op_type != "QuantizeLinear" or quantize.inputs[0] is None:
            continue
        if quantize not in raised:
            raised[quantize] = None
            x = quantize.inputs[0]
            unsqueeze = ir.node("Unsqueeze", [x, axis], name=f"{quantize.name}.rank_3", outputs=[_raised(x)])
            graph.insert_before(quantize, unsqueeze)
            quantize.replace_input_with(0, unsqueeze.outputs[0])
        _lower_result(graph, node, axis)
    for quantize in raised:
        for value in (quantize.outputs[0], *(out for user in quantize.outputs[0].consumers() for out in user.outputs)):
            if value.shape is not None and len(value.shape) == 2:
                value.shape = ir.Shape([1, *value.shape])


def quantized_products(graph: ir.Graph) -> list[ir.Node]:
    """MatMuls both of whose operands are dequantized."""
    return [
        node
        for node in graph
        if node.op_type == "MatMul" and all(_is_dequantized(value) for value in node.inputs[:2])
    ]


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _lower_result(graph: ir.Graph, product: ir.Node, axis: ir.Value) -> None:
    """Squeeze behind the product, or behind its bias."""
    result = product.outputs[0]
    users = list(result.consumers())
    if len(users) == 1 and users[0].op_type == "Add" and any(_is_bias(value) for value in users[0].inputs):
        result.shape = None if result.shape is None else ir.Shape([1, *result.shape])
        result = users[0].outputs[0]
    last = result.producer()
    assert last is not None
    squeezed = ir.Value(name=f"{result.name}.rank_2", type=result.type, shape=result.shape)
    is_output, name = result.is_graph_output(), result.name
    result.replace_all_uses_with(squeezed, replace_graph_outputs=True)
    graph.insert_after(last, ir.node("Squeeze", [result, axis], name=f"{last.name}.rank_2", outputs=[squeezed]))
    result.shape = None if result.shape is None else ir.Shape([1, *result.shape])
    if is_output:
        result.name, squeezed.name = f"{name}.rank_3", name


def _is_bias(value: ir.Value | None) -> bool:
    constant_value = value.const_value if value is not None else None
    return constant_value is not None and math.prod(constant_value.shape) == constant_value.shape[-1]


def _raised(value: ir.Value) -> ir.Value:
    shape = None if value.shape is None else ir.Shape([1, *value.shape])
    return ir.Value(name=f"{value.name}.rank_3", type=value.type, shape=shape)
