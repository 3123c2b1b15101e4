# SPDX-License-Identifier: Apache-2.0
"""A canonical graph for parsers that read opset 17: what later opsets brought, said with earlier operators."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.lowering.attention import constant

# Operators whose axes became an input with opset 18.
_REDUCTIONS = frozenset(
    {"ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
)


def to_opset_17(model: ir.Model) -> None:
    """Rewrite in place what our graphs have of opsets 18 to 20, and CastLike, which 8.6 may not read.

    Given:  Gelu(x), ReduceMax(x, axes), Cast<to, saturate>(x), CastLike(x, y)
    Result: 0.5 x (1 + Erf(x / √2)), ReduceMax<axes>(x), Cast<to>(x), Cast<to>(x)
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Gelu":
            _decompose_gelu(graph, node)
        elif node.op_type in _REDUCTIONS and len(node.inputs) > 1:
            _axes_to_attribute(node)
        elif node.op_type == "CastLike" and node.outputs[0].dtype is not None:
            node.op_type = "Cast"
            node.replace_input_with(1, None)
            node.resize_inputs(1)
            node.attributes.clear()
            node.attributes["to"] = ir.AttrInt64("to", int(node.outputs[0].dtype))
        elif node.op_type in ("Cast", "QuantizeLinear"):
            node.attributes.pop("saturate", None)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    model.opset_imports[""] = 17


def _axes_to_attribute(node: ir.Node) -> None:
    axes = node.inputs[1]
    node.attributes.pop("noop_with_empty_axes", None)
    if axes is not None and axes.const_value is not None:
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.const_value.numpy().reshape(-1)])
    node.replace_input_with(1, None)
    node.resize_inputs(1)


def _decompose_gelu(graph: ir.Graph, node: ir.Node) -> None:
    """Erf, or tanh where the model's GELU is that approximation (Hendrycks and Gimpel, arXiv 1606.08415)."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    prefix = node.name or "gelu"
    nodes: list[ir.Node] = []

    def add(operator: str, *inputs: ir.Value | float) -> ir.Value:
        values = [
            one if isinstance(one, ir.Value) else constant(graph, f"gelu.{one:.9g}", np.array(one, np.float32))
            for one in inputs
        ]
        value = ir.Value(name=f"{y.name}.{operator}_{len(nodes)}", type=x.type, shape=x.shape)
        nodes.append(ir.Node("", operator, values, outputs=[value], name=f"{prefix}/{operator}_{len(nodes)}"))
        return value

    if node.attributes.get_string("approximate", "none") == "tanh":
        cubic = add("Mul", add("Mul", add("Mul", x, x), x), 0.044715)
        bent = add("Tanh", add("Mul", add("Add", x, cubic), math.sqrt(2 / math.pi)))
    else:
        bent = add("Erf", add("Div", x, math.sqrt(2)))
    result = add("Mul", add("Mul", x, 0.5), add("Add", bent, 1.0))
    graph.insert_before(node, nodes)
    y.replace_all_uses_with(result, replace_graph_outputs=True)
    name = y.name
    graph.remove(node, safe=True)
    result.name = name
