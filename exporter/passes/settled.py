# SPDX-License-Identifier: Apache-2.0
"""Types and shapes that tracing asks for at every call, though the graph says them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class SettleTypesAndShapesPass(ir.passes.InPlacePass):
    """Puts types that are known into casts, and shapes that are known into constants, so that these can be folded.

    Given:  CastLike(1.0, x), Expand(., Shape(x))      x of (1, 54, 384)
    Result: 1.0, Expand(., initializer)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "CastLike" and node.inputs[1] is not None and node.inputs[1].dtype is not None:
                _settle_cast(model.graph, node, node.inputs[1].dtype)
                modified = True
            elif node.op_type == "Shape" and (sizes := _sizes(node)) is not None:
                _replace_shape(model.graph, node, sizes)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _settle_cast(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    """A Cast, or nothing where the type is that already."""
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    if source.dtype == dtype and not result.is_graph_output():
        result.replace_all_uses_with(source)
        graph.remove(node, safe=True)
        return
    cast = ir.node("Cast", [source], {"to": int(dtype)}, name=node.name)
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), result.shape
    cast.metadata_props.update(node.metadata_props)
    graph.insert_after(node, cast)
    name = result.name
    result.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    cast.outputs[0].name = name


def _sizes(node: ir.Node) -> list[int] | None:
    """What a Shape gives, None where a size of it is dynamic."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    sizes = shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(shape))]
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == len(sizes) else None


def _replace_shape(graph: ir.Graph, node: ir.Node, sizes: list[int]) -> None:
    array, result = np.array(sizes, np.int64), node.outputs[0]
    constant = ir.Value(
        name=result.name,
        const_value=ir.tensor(array, name=result.name),
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape(array.shape),
    )
    result.replace_all_uses_with(constant, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    graph.initializers[str(constant.name)] = constant
