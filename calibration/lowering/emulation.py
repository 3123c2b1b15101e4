# SPDX-License-Identifier: Apache-2.0
"""A 16-bit graph as an fp32 graph that rounds after every node: what ONNX Runtime's CPU kernels can check it with.

Given the graph itself they would compute whole chains in fp32 (they drop the casts between), and hide an overflow; and
bf16 they do not compute at all. Sums inside of a node stay fp32, as they do in TensorRT's kernels. It is a reference:
TensorRT rounds in other places, for it fuses other nodes.
"""

from __future__ import annotations

import onnx_ir as ir

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def emulate(model: ir.Model) -> None:
    """Rewrite in place.

    Given:  y16 = MatMul(x16, w16)
    Result: y = Cast32(Cast16(MatMul(x, w)))      with w rounded to 16 bits
    """
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype in _HALF and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.dtype = ir.DataType.FLOAT
    for node in list(graph):
        for output in node.outputs:
            if output.dtype in _HALF:
                _round(graph, node, output, output.dtype)
        if node.op_type == "Cast" and node.attributes.get_int("to") in _HALF:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value, dtype: ir.DataType) -> None:
    users = list(output.uses())
    output.dtype = ir.DataType.FLOAT
    narrow = ir.Value(name=f"{output.name}.narrow", shape=output.shape, type=ir.TensorType(dtype))
    wide = ir.Value(name=f"{output.name}.rounded", shape=output.shape, type=ir.TensorType(ir.DataType.FLOAT))
    casts = [
        ir.Node("", "Cast", [source], [ir.AttrInt64("to", int(to))], outputs=[result], name=f"{result.name}/Cast")
        for source, to, result in ((output, dtype, narrow), (narrow, ir.DataType.FLOAT, wide))
    ]
    graph.insert_after(node, casts)
    for user, index in users:
        user.replace_input_with(index, wide)
