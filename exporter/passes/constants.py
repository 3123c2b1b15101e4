# SPDX-License-Identifier: Apache-2.0
"""Everything that does not depend on an input is computed now."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from perceiver_export.runtimes.errors import ExportError

_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
)

_GROWING = frozenset({"Expand", "Add", "Mul", "MatMul"})
_SMALL, _LARGE = 1 << 12, 1 << 20  # numbers


class FoldConstantsPass(ir.passes.InPlacePass):
    """Replaces what depends on constants only by its value: one run of ONNX Runtime over that part of the graph.

    Given:  MatMul(x, Transpose(W)), MatMul(LayerNormalization(latents, γ, β), V), Reshape(y, Concat([1], [784], …))
    Result: MatMul(x, W'), initializer, Reshape(y, initializer)

    What only repeats or combines small constants into a large array stays: a position table for each picture of a
    batch, the sum of two axes' scores over a grid. Its result would be stored.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        constant = {value for value in graph.initializers.values() if value.const_value is not None}
        foldable: list[ir.Node] = []
        for node in graph:
            if all(value is None or value in constant for value in node.inputs) and not _must_stay(node):
                foldable.append(node)
                constant.update(node.outputs)
        folded = set(foldable)
        frontier = [
            value
            for node in foldable
            for value in node.outputs
            if value.is_graph_output() or any(user not in folded for user in value.consumers())
        ]
        if not frontier:
            return ir.passes.PassResult(model, modified=False)
        for value, array in zip(frontier, _evaluate(model, foldable, frontier), strict=True):
            _replace(graph, value, array)
        for node in reversed(foldable):
            if not any(output.uses() or output.is_graph_output() for output in node.outputs):
                graph.remove(node, safe=True)
        for name in [name for name, value in graph.initializers.items() if not value.uses()]:
            del graph.initializers[name]
        return ir.passes.PassResult(model, modified=True)


def _must_stay(node: ir.Node) -> bool:
    """A node that draws numbers or holds a graph, or whose result is large and larger than what it is made of."""
    if node.op_type in _RANDOM or any(
        attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()
    ):
        return True
    if node.op_type not in _GROWING:
        return False
    if node.op_type == "Expand" and (size := _expanded(node)) is not None:
        return size > _SMALL
    shapes = [value.shape for value in (*node.inputs, *node.outputs) if value is not None]
    if not all(shape is not None and shape.is_static() for shape in shapes):
        return node.op_type == "Expand"
    *sources, result = (math.prod(shape.numpy()) for shape in shapes if shape is not None)
    return result > sum(sources) and (node.op_type == "Expand" or result > _LARGE)


def _expanded(node: ir.Node) -> int | None:
    """How many numbers an Expand gives; None where its shape is computed. Inference does not always tell."""
    source, target = node.inputs[:2]
    if source is None or source.shape is None or not source.shape.is_static():
        return None
    if target is None or target.const_value is None:
        return None
    return math.prod(np.broadcast_shapes(source.shape.numpy(), tuple(target.const_value.numpy().tolist())))


def _evaluate(model: ir.Model, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> list[np.ndarray]:
    """The values of ``outputs``, computed by ONNX Runtime from a graph without inputs."""
    import onnxruntime

    values: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value not in values:
                values[value] = ir.Value(
                    name=value.name, const_value=value.const_value, type=value.type, shape=value.shape
                )
    initializers = list(values.values())
    copies = []
    for node in nodes:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else values[value] for value in node.inputs],
            list(node.attributes.values()),
            outputs=[ir.Value(name=value.name, type=value.type, shape=value.shape) for value in node.outputs],
            name=node.name,
        )
        values.update(zip(node.outputs, copy.outputs, strict=True))
        copies.append(copy)
    graph = ir.Graph(
        [],
        [values[value] for value in outputs],
        nodes=copies,
        initializers=initializers,
        opset_imports=model.opset_imports,
    )
    serialized = ir.to_proto(ir.Model(graph, ir_version=model.ir_version)).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {}))


def _replace(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    """Put an initializer in the place of a computed value; a transposed weight keeps the weight's name."""
    producer = value.producer()
    name = value.name
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        source = producer.inputs[0]
        if source.is_initializer() and len(source.uses()) == 1:
            name = source.name
            source.name = f"{name}.untransposed"
    if name is None:
        raise ExportError("the traced graph has a value without a name", "report it with the config")
    constant = ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        type=value.type,
        shape=ir.Shape(array.shape),
    )
    value.replace_all_uses_with(constant, replace_graph_outputs=True)
    graph.initializers[name] = constant
