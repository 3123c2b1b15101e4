# SPDX-License-Identifier: Apache-2.0
"""`simplify`: rewrites of the graph that leave all results as they are, with onnx-ir's own passes where it has them."""

from __future__ import annotations

import ast
import itertools
import math
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import transpose_transpose_rule

from perceiver_export.calibration.graphs import constant
from perceiver_export.exporter.fold.nodes import (
    VIEWS,
    array_of,
    exits,
    is_known,
    made_by,
    operand,
    optional,
    put,
    shape_of,
    sizes,
)
from perceiver_export.runtimes.errors import ExportError, first_line

_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
_REPEATING = frozenset({"Expand", "Tile", "ConstantOfShape"})
_GROWING = frozenset({"Expand", "Tile", "Add", "Mul", "MatMul", "Gather"})
_INTEGERS, _EXACT = (ir.DataType.INT32, ir.DataType.INT64), (ir.DataType.FLOAT, ir.DataType.DOUBLE)
_SMALL, _LARGE = 1 << 12, 1 << 20  # elements
_NETWORK = "model."  # the name of the network inside each graph, see `graphs`
_SCOPES = "pkg.torch.onnx.name_scopes"


class FoldConstantsPass(ir.passes.InPlacePass):
    """Computes constant expressions in one run of ONNX Runtime over that part of the graph.

    Given:  MatMul(x, Transpose(W)), MatMul(LayerNormalization(latents, γ, β), V), Reshape(y, Concat([1], [784], …))
    Result: MatMul(x, W'), initializer, Reshape(y, initializer)

    Nodes that repeat or combine small constants into a large array stay, because the array would be stored: a position
    table for each image of a batch, the sum of two axes' scores over a grid. So do nodes that repeat a constant along a
    dynamic dimension, whose size is a multiple of one of the primes ``dynamic``.
    """

    def __init__(self, dynamic: Collection[int] = ()) -> None:
        super().__init__()
        self.dynamic = tuple(dynamic)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        known = {value for value in graph.initializers.values() if value.const_value is not None}
        folded: dict[ir.Node, None] = {}  # in the graph's order
        for node in graph:
            stays = _must_stay(node) or self._repeats(node)
            if all(value is None or value in known for value in node.inputs) and not stays:
                folded[node] = None
                known.update(node.outputs)
        frontier = exits(folded)
        if not frontier:
            return ir.passes.PassResult(model, modified=False)
        views = {value: array for value in frontier if (array := _view(value)) is not None}
        if computed := [value for value in frontier if value not in views]:
            part = ir.Model(ir.convenience.extract(graph, [], computed), ir_version=model.ir_version)
            views |= zip(computed, evaluate(part), strict=True)
        for value in frontier:
            _replace(graph, value, views[value])
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def _repeats(self, node: ir.Node) -> bool:
        """Whether a node repeats its input for each step of a dynamic dimension."""
        shape = node.outputs[0].shape
        if not self.dynamic or node.op_type not in _REPEATING or shape is None:
            return False
        return any(isinstance(size, int) and size % prime == 0 for size in shape for prime in self.dynamic)


def is_random(node: ir.Node) -> bool:
    """Whether a node draws random numbers; Dropout does in training mode, or if its mode is not constant."""
    if node.op_type != "Dropout" or (mode := optional(node, 2)) is None:
        return node.op_type in _RANDOM
    known = ir.convenience.get_const_tensor(mode)
    return known is None or bool(known.numpy().any())


def _must_stay(node: ir.Node) -> bool:
    """Whether a node draws random numbers, contains a graph, or has a large result that is larger than its inputs."""
    if is_random(node) or any(one.type == ir.AttributeType.GRAPH for one in node.attributes.values()):
        return True
    if node.op_type not in _GROWING:
        return False
    expands = node.op_type in _REPEATING
    if node.op_type == "Expand" and (size := _expanded(node)) is not None:
        return size > _SMALL
    if not is_known(node):
        return expands
    *sources, result = (math.prod(sizes(value)) for value in (*node.inputs, *node.outputs) if value is not None)
    return result > sum(sources) and (expands or result > _LARGE)


def _expanded(node: ir.Node) -> int | None:
    """The size of an Expand's result, which shape inference does not always find; None if its shape is computed."""
    source, target = shape_of(node.inputs[0]), operand(node, 1).const_value
    if source is None or target is None:
        return None
    return math.prod(np.broadcast_shapes(source, tuple(target.numpy().tolist())))


def _view(value: ir.Value) -> np.ndarray | None:
    """A constant, or a reshaped or transposed one, which shares the weight's memory; None for any other value."""
    node, array = value.producer(), array_of(value)
    if array is not None or node is None or node.op_type not in (*VIEWS, "Expand", "Transpose") or not is_known(node):
        return array
    array = _view(operand(node))
    if array is None or array.size != math.prod(sizes(value)):
        return None
    if node.op_type == "Transpose":
        return array.transpose(node.attributes.get_ints("perm", tuple(range(array.ndim))[::-1]))
    return array.reshape(sizes(value))


def evaluate(model: ir.Model) -> list[np.ndarray]:
    """The outputs of a graph without inputs, computed by ONNX Runtime."""
    return list(plain_session(ir.to_proto(model).SerializeToString()).run(None, {}))


def plain_session(model: str | bytes) -> Any:
    """A session of ONNX Runtime that runs a graph as it is, without optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _replace(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    """Replace a computed value by an initializer; a transposed weight keeps the weight's name."""
    producer, name = value.producer(), str(value.name)
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        source = producer.inputs[0]
        if source.is_initializer() and len(source.uses()) == 1:
            name, source.name = str(source.name), f"{source.name}.untransposed"
    made = ir.val(name, const_value=ir.tensor(array, name=name))
    value.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.initializers.add(made)


class NameNodesPass(ir.passes.InPlacePass):
    """Names every node after its torch module, and every weight as the model does.

    Given:  node_MatMul_57, from encoder.self_attentions.0.attention, second block
    Result: encoder.self_attentions.0.attention/MatMul_7
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        weights = model.graph.initializers
        for name, value in list(weights.items()):
            short = name.removeprefix(_NETWORK)
            if short not in weights:  # a module may have both `norm` and `model.norm`
                value.name = short
        seen: Counter[str] = Counter()
        for node in model.graph:
            prefix = f"{module_of(node)}/{node.op_type}"
            seen[prefix] += 1
            node.name = f"{prefix}_{seen[prefix]}"
        return ir.passes.PassResult(model, modified=True)


def module_of(node: ir.Node) -> str:
    """Path of the innermost module that torch recorded, else the one in the node's name, else `model`."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        scopes = []
    # The last scope is the operation itself; names with an underscore in front are torch's own, not modules.
    named = (str(scope) for scope in reversed(scopes[:-1]) if scope and not str(scope).startswith("_"))
    path = (node.name or "").rpartition("/")[0].strip("/").replace("/", ".")  # from TorchScript, or named before
    return next(named, path or "model").removeprefix(_NETWORK)


class SettleTypesAndShapesPass(ir.passes.InPlacePass):
    """Replaces types and shapes that are computed at run time with known ones, so that they fold.

    Given:  CastLike(1.0, x), Expand(., Shape(x)), Reshape(x, [1, 54, 384])      x of (1, 54, 384)
    Result: 1.0, Expand(., initializer), x
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in list(model.graph):
            if node.op_type == "CastLike" and (dtype := operand(node, 1).dtype) is not None:
                if operand(node).dtype != dtype or node.outputs[0].is_graph_output():
                    _become_cast(node, dtype)
                    continue
                put(node.outputs[0], operand(node))
            elif node.op_type == "Shape" and (found := _found_shape(node)) is not None:
                _replace(model.graph, node.outputs[0], np.array(found, np.int64))
            elif node.op_type in ("Reshape", "Expand") and _changes_nothing(node):
                put(node.outputs[0], operand(node))
            else:
                continue
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=True)


def _become_cast(node: ir.Node, dtype: ir.DataType) -> None:
    node.op_type = "Cast"
    node.resize_inputs(1)
    node.attributes["to"] = ir.AttrInt64("to", int(dtype))
    node.outputs[0].type = ir.TensorType(dtype)


def _changes_nothing(node: ir.Node) -> bool:
    source, result = operand(node), node.outputs[0]
    ends = source.is_graph_input() or source.is_initializer() or source.is_graph_output()
    return shape_of(source) is not None and source.shape == result.shape and not (ends and result.is_graph_output())


def _found_shape(node: ir.Node) -> list[int] | None:
    """The result of a Shape node, None if one of its sizes is dynamic."""
    shape = operand(node).shape
    if shape is None:
        return None
    asked = shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(shape))]
    known = [size for size in asked if isinstance(size, int)]
    return known if len(known) == len(asked) else None


class DivideIntegersPass(ir.passes.InPlacePass):
    """Divides indices as integers, because engines that compute in 16 bits would round them.

    Given:  Cast(Floor(Div(Cast(i, float), 48)), int32)      i of int32, as torch.div(i, 48, rounding_mode="floor")
    Result: Div(Sub(i, Mod(i, 48)), 48)

    Float32 is exact below 2²⁴, integers always; but OpenVINO computes integers on the CPU in float32.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in list(model.graph):
            rounding, quotient = _rounded(operand(node)) if _makes(node, _INTEGERS) else ("", None)
            cast = made_by(quotient.inputs[0], "Cast") if quotient is not None else None
            divisor = array_of(quotient.inputs[1]) if quotient is not None else None
            if cast is None or not _makes(cast, _EXACT) or divisor is None or (dtype := operand(cast).dtype) is None:
                continue
            if dtype in _INTEGERS and np.all((divisor >= 1) & (divisor % 1 == 0) & (divisor < 2**31)):
                _divide(model.graph, node, operand(cast), divisor.astype(dtype.numpy()), rounding)
        return ir.passes.PassResult(model, modified=True)


def _makes(node: ir.Node, dtypes: Collection[ir.DataType]) -> bool:
    return node.op_type == "Cast" and node.outputs[0].dtype in dtypes


def _rounded(value: ir.Value) -> tuple[str, ir.Node | None]:
    """How a division is rounded, Floor or Ceil ("" if the Cast rounds it toward zero), and the division."""
    signed = made_by(value, "Mul")  # Mul(Floor(Abs(q)), Sign(q)): rounding_mode="trunc"
    if signed is not None:
        sign, floor = made_by(operand(signed, 1), "Sign"), made_by(operand(signed), "Floor")
        absolute = made_by(operand(floor), "Abs") if floor is not None else None
        same = sign is not None and absolute is not None and operand(sign) is operand(absolute)
        return "", made_by(operand(sign), "Div") if sign is not None and same else None
    rounded = made_by(value, "Floor", "Ceil")
    return ("", made_by(value, "Div")) if rounded is None else (rounded.op_type, made_by(operand(rounded), "Div"))


def _divide(graph: ir.Graph, node: ir.Node, dividend: ir.Value, divisor: np.ndarray, rounding: str) -> None:
    """Replace the Cast ``node`` with a division of integers, which by itself rounds toward zero."""
    result, made = node.outputs[0], list[ir.Node]()
    name = str(result.name)

    def make(operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        made.append(ir.node(operator, inputs, attributes, metadata_props=node.metadata_props))
        (value,) = made[-1].outputs
        value.name, value.type, value.shape = f"{name}.{operator}", dividend.type, result.shape
        return value

    by = constant(graph, f"{name}.divisor", divisor)
    if rounding == "Ceil":
        dividend = make("Add", dividend, constant(graph, f"{name}.more", divisor - 1))
    quotient = make("Div", make("Sub", dividend, make("Mod", dividend, by)) if rounding else dividend, by)
    if result.dtype is not None and result.dtype != dividend.dtype:
        quotient = make("Cast", quotient, to=int(result.dtype))
        quotient.type = result.type
    put(result, quotient)
    graph.insert_after(node, made)
    graph.remove(node, safe=True)


def simplify(model: ir.Model, dynamic: Collection[int] = ()) -> None:
    """Apply the passes in place; ``dynamic``: the primes that stand in for dynamic dimensions.

    Raises ExportError, for example if ONNX Runtime cannot compute a constant.
    """
    passes = ir.passes.Sequential(
        # One Transpose(W) per weight instead of one per use, so that folding makes one array of it.
        common.CommonSubexpressionEliminationPass(),
        SettleTypesAndShapesPass(),
        # Folding and counting FLOPs need types and shapes that the exporter leaves open.
        common.ShapeInferencePass(),
        # Two Transposes in a row: features come as rows and are read as columns.
        RewritePass([transpose_transpose_rule]),
        FoldConstantsPass(dynamic),
        FoldConstantsPass(dynamic),  # again, for small arrays that are expanded to a shape computed by the first
        DivideIntegersPass(),
        common.IdentityEliminationPass(),
        # Nodes that lost their readers.
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        NameNodesPass(),
    )
    try:
        passes(model)
    except ir.passes.PassError as error:
        raise ExportError(
            f"the traced graph cannot be simplified: {first_line(error.__cause__ or error)}",
            "compute the model's constants in float32 or int64",
        ) from error


def without_sequences(model: ir.Model) -> None:
    """Inline functions, and remove sequences that only carry tensors, as some exporters write for Split.

    onnxscript's `optimize` does this too, but its rules treat an addition of 1e-8 as an addition of zero.
    """
    if not model.functions and not any("Sequence" in node.op_type for node in model.graph):
        return  # constant folding also removes the names of weights
    from onnxscript.optimizer import fold_constants_ir

    common.InlinePass()(model)
    for _ in range(2):  # the second folds what depends on shapes that the first settles
        fold_constants_ir(
            model, onnx_shape_inference=True, should_fold=lambda node: False if node.op_type in _REPEATING else None
        )
    common.RemoveUnusedNodesPass()(model)


def without_metadata(model: ir.Model) -> None:
    """Remove metadata, whose stack traces hold paths of this machine. Call it last: names come from metadata."""
    common.ClearMetadataAndDocStringPass()(model)


def number_folds(graph: ir.Graph, taken: Collection[str] = ()) -> None:
    """Number the values that folds made, from 0, so that the same model always becomes the same bytes.

    ``taken``: names of its inputs and outputs.
    """
    made = {value for value in graph.initializers.values() if str(value.name).startswith(("fold.", "fold_"))}
    for value in made:
        del graph.initializers[str(value.name)]
    used = dict.fromkeys(value for node in graph for value in node.inputs if value in made)
    numbers = (index for index in itertools.count() if not {f"fold.{index}", f"fold.{index}.direct"} & set(taken))
    for index, value in zip(numbers, used, strict=False):
        role = ".direct" if str(value.name).endswith(".direct") else ""
        value.name = f"fold.{index}{role}"
        graph.initializers.add(value)
    values = (value for node in graph for value in node.outputs if (value.name or "").startswith("fold_"))
    numbers = (index for index in itertools.count() if f"fold_{index}" not in taken)
    for index, value in zip(numbers, values, strict=False):
        value.name = f"fold_{index}"
