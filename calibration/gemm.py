# SPDX-License-Identifier: Apache-2.0
"""Gemm as MatMul and Add, so that there is one kind of linear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def split_gemms(graph: ir.Graph) -> None:
    """Rewrite in place every Gemm with a constant right operand; alpha, beta and transB go into weight and bias.

    Given:  y = Gemm<transB = 1, alpha = a, beta = b>(x, W, c)
    Result: y = Add(MatMul(x, a Wᵀ), b c)
    """
    rewritten: dict[tuple[ir.Value, float, bool], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Gemm" or node.attributes.get_int("transA", 0):
            continue
        x, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if x is None or weight is None or weight.const_value is None or (bias is not None and bias.const_value is None):
            continue
        alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
        transposed = bool(node.attributes.get_int("transB", 0))
        key = (weight, alpha, transposed)
        if key not in rewritten:
            array = weight.const_value.numpy()
            array = np.ascontiguousarray((array.T if transposed else array) * np.float32(alpha))
            rewritten[key] = constant(graph, f"{weight.name}.matmul", array)
        _replace(graph, node, x, rewritten[key], bias, beta)
    remove_unused(graph)


def constant(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """A new initializer under that name, or one like it where the name is taken."""
    unique, count = name, 1
    while unique in graph.initializers:
        count += 1
        unique = f"{name}.{count}"
    tensor = ir.tensor(array, dtype=dtype, name=unique)
    value = ir.Value(
        name=unique, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape)
    )
    graph.register_initializer(value)
    return value


def remove_unused(graph: ir.Graph) -> None:
    """Drop the initializers that no node reads any more."""
    for name in [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
        del graph.initializers[name]


def _replace(
    graph: ir.Graph, node: ir.Node, x: ir.Value, weight: ir.Value, bias: ir.Value | None, beta: float
) -> None:
    output = node.outputs[0]
    product = ir.node("MatMul", [x, weight], name=f"{node.name}.matmul", outputs=[_like(output, ".matmul")])
    nodes = [product]
    result = product.outputs[0]
    if bias is not None and bias.const_value is not None:
        scaled = bias
        if beta != 1.0:
            scaled = constant(graph, f"{bias.name}.scaled", bias.const_value.numpy() * np.float32(beta))
        nodes.append(ir.node("Add", [result, scaled], name=f"{node.name}.add", outputs=[_like(output, ".add")]))
        result = nodes[-1].outputs[0]
    graph.insert_before(node, nodes)
    name = output.name
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name


def _like(value: ir.Value, suffix: str) -> ir.Value:
    return ir.Value(name=f"{value.name}{suffix}", type=value.type, shape=value.shape)
