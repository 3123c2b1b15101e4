# SPDX-License-Identifier: Apache-2.0
"""Bring equivalent operators to one form, with every shape known; and compute constant expressions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from perceiver_export.exporter.fold.nodes import (
    VIEWS,
    Nodes,
    Sizes,
    array_of,
    axis_of,
    integers,
    is_foldable,
    made_by,
    number,
    only_reader,
    operand,
    optional,
    over_last,
    put,
    shape_of,
    sizes,
    stored_sizes,
)
from perceiver_export.exporter.fold.slicing import places, upstream
from perceiver_export.exporter.simplify import FoldConstantsPass, SettleTypesAndShapesPass, evaluate

_MOST_ROUNDS = 60  # of settling shapes: those of a layer are known once those of the layer before are
_LARGEST_TABLE = 1 << 26  # elements of the largest constant that is computed


def normalize(model: ir.Model, real: Sizes) -> None:
    """Normalize in place. Values of unknown shape are left as they are, and nothing that reads them is folded."""
    settle(model, real)
    for rules in (_RULES, _NORMS):
        for node in list(model.graph):
            if node.op_type in rules and is_foldable(node):
                rules[node.op_type](Nodes(node), node)
    settle(model, real)
    _one_sample(model, real)
    settle(model, real)


def settle(model: ir.Model, real: Sizes) -> None:
    """Turn shapes that the graph computes into constants, and infer their readers, until nothing changes."""
    fold_constants = FoldConstantsPass(real.planned)
    rounds = [SettleTypesAndShapesPass(), common.ShapeInferencePass(), fold_constants, fold_constants]
    _apply(model, *rounds)
    before = -1
    for _ in range(_MOST_ROUNDS):
        unknown = [one for node in model.graph for one in node.outputs if shape_of(one) is None]
        if len(unknown) in (0, before):
            break
        before = len(unknown)
        for value in unknown:
            if not value.is_graph_output():
                value.shape = None  # a leftover of tracing with symbols
        _apply(model, common.ShapeInferencePass(), *rounds[:3])
    _apply(
        model,
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
    )


def _apply(model: ir.Model, *passes: ir.passes.InPlacePass) -> None:
    for one in passes:
        one(model)


class Constants:
    """The arrays of values that depend on constants only, but that the graph computes because they are large.

    Their dynamic dimensions have one step: constants are the same for all samples.
    """

    def __init__(self, real: Sizes) -> None:
        self._real = real
        self._known: dict[ir.Value, np.ndarray | None] = {}

    def __call__(self, value: ir.Value) -> np.ndarray | None:
        if value not in self._known:
            array = array_of(value)
            self._known[value] = self._computed(value) if array is None else self._one_step(array)
        return self._known[value]

    def _computed(self, value: ir.Value) -> np.ndarray | None:
        node, shape = value.producer(), shape_of(value)
        if node is None or shape is None:
            return None
        target = tuple(self._real.one(size) for size in shape)
        if node.op_type in (*VIEWS, "Expand"):  # these need no memory
            source = self(operand(node))
            if source is None:
                return None
            return np.broadcast_to(source, target) if node.op_type == "Expand" else source.reshape(target)
        if math.prod(target) > _LARGEST_TABLE or any(map(_is_given, upstream([value]))):
            return None
        part = ir.convenience.extract(value.graph, [], [value])  # type: ignore[arg-type]
        for one in part:
            for index, found in stored_sizes(one):
                if any(map(self._real.dynamic, found)):
                    fixed = np.array([self._real.one(size) for size in found], np.int64)
                    one.replace_input_with(index, Nodes(one).constant(fixed))
        for stored in part.initializers.values():
            array = array_of(stored)
            if array is not None and any(self._real.dynamic(size) for size in array.shape):
                array = self._one_step(array)
                if array is None:
                    return None
                stored.const_value, stored.shape = ir.tensor(array, name=stored.name), ir.Shape(array.shape)
        return evaluate(ir.Model(part, ir_version=10))[0]

    def _one_step(self, array: np.ndarray) -> np.ndarray | None:
        """The first of equal samples; None if they differ."""
        one = array[tuple(slice(0, self._real.one(size)) for size in array.shape)]
        if one.shape == array.shape:
            return array
        tiles = [size // own for size, own in zip(array.shape, one.shape, strict=True)]
        return one if np.array_equal(array, np.tile(one, tiles), equal_nan=array.dtype.kind == "f") else None


def _is_given(value: ir.Value) -> bool:
    """Whether a value is neither stored nor computed, but an input."""
    return value.producer() is None and array_of(value) is None


def _one_sample(model: ir.Model, real: Sizes) -> None:
    """Store constants that are the same for each sample of a batch only once.

    Given:  MatMul(LayerNormalization(Expand(latents, [8, 32, 64]), γ, β), W), read by MatMul with x of 8 samples
    Result: initializer of (1, 32, 64); the reader broadcasts it
    """
    constant = Constants(real)
    for node in list(model.graph):
        if all(value is None or constant(value) is not None for value in node.inputs):
            continue
        for index, value in enumerate(node.inputs):
            shape = shape_of(value)
            if value is None or not shape or shape[0] < 2 or (len(shape) < 3 and not real.dynamic(shape[0])):
                continue
            array = constant(value)
            if array is None or not np.array_equal(array, np.broadcast_to(array[:1], array.shape)):
                continue
            if array.shape != tuple(real.one(size) for size in shape) or real.one(shape[0]) not in (1, shape[0]):
                continue  # the first axis does not count samples
            nodes = Nodes(node)
            if _broadcasts(node, index):
                node.replace_input_with(index, nodes.constant(array[:1]))
            elif made_by(value, "Expand") is None:
                node.replace_input_with(index, nodes.expand(nodes.constant(array[:1]), shape))
    common.RemoveUnusedNodesPass()(model)


def _broadcasts(node: ir.Node, index: int) -> bool:
    """Whether the other operand has all samples, so that this one can be broadcast."""
    shape = sizes(operand(node, index))
    if node.op_type not in ("MatMul", "Add", "Sub", "Mul", "Div"):
        return False
    other = shape_of(node.inputs[1 - index])
    return other is not None and len(other) == len(shape) and other[0] == shape[0]


def _gemm(nodes: Nodes, node: ir.Node) -> None:
    """Gemm -> MatMul, Add."""
    left, right, bias = operand(node), operand(node, 1), optional(node, 2)
    if node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_float("beta", 1.0) != 1.0:
        return
    if node.attributes.get_int("transA", 0):
        left = nodes.transpose(left, (1, 0))
    if node.attributes.get_int("transB", 0):
        right = nodes.transpose(right, (1, 0))
    product = nodes.matmul(left, right)
    put(node.outputs[0], nodes.binary("Add", product, bias) if bias is not None else product)


def _vectors(nodes: Nodes, node: ir.Node) -> None:
    """A product with a vector -> MatMul of matrices, Reshape."""
    left, right = operand(node), operand(node, 1)
    if len(sizes(left)) > 1 < len(sizes(right)):
        return
    left = nodes.reshape(left, (1, -1)) if len(sizes(left)) == 1 else left
    right = nodes.reshape(right, (-1, 1)) if len(sizes(right)) == 1 else right
    put(node.outputs[0], nodes.reshape(nodes.matmul(left, right), sizes(node.outputs[0])))


def _einsum(nodes: Nodes, node: ir.Node) -> None:
    """Einsum of two operands without repeated or summed letters -> Transpose, Reshape, MatMul."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    if equation.count(",") != 1 or "->" not in equation:
        return
    one, other, result = (
        _spelled_out(letters, value)
        for letters, value in zip(equation.replace("->", ",").split(","), (*node.inputs, node.outputs[0]), strict=True)
    )
    batch = [letter for letter in result if letter in one and letter in other]
    inner = [letter for letter in one if letter in other and letter not in result]
    rows = [letter for letter in result if letter in one and letter not in other]
    columns = [letter for letter in result if letter in other and letter not in one]
    if len(one) != len(batch + inner + rows) or len(other) != len(batch + inner + columns):
        return
    left, right = operand(node), operand(node, 1)
    size = {**dict(zip(one, sizes(left), strict=True)), **dict(zip(other, sizes(right), strict=True))}
    if any(size[letter] != extent for letter, extent in zip(one, sizes(left), strict=True)):
        return  # one operand is broadcast

    def extents(letters: list[str]) -> list[int]:
        return [size[letter] for letter in letters]

    def arranged(value: ir.Value, letters: str, order: list[str], shape: list[int]) -> ir.Value:
        return nodes.reshape(nodes.transpose(value, [letters.index(letter) for letter in order]), shape)

    depth, count, width = (math.prod(extents(letters)) for letters in (inner, rows, columns))
    product = nodes.matmul(
        arranged(left, one, batch + rows + inner, [*extents(batch), count, depth]),
        arranged(right, other, batch + inner + columns, [*extents(batch), depth, width]),
    )
    order = batch + rows + columns
    apart = nodes.reshape(product, extents(order))
    put(node.outputs[0], nodes.transpose(apart, [order.index(letter) for letter in result]))


def _spelled_out(letters: str, value: ir.Value | None) -> str:
    """An operand's letters, with capital letters for the axes of an ellipsis, aligned at the last."""
    missing = len(shape_of(value) or ()) - len(letters.replace(".", ""))
    return letters.replace("...", "ABCDEFGH"[8 - missing :] if missing else "")


def _pointwise(nodes: Nodes, node: ir.Node) -> None:
    """A convolution of kernel 1 -> Transpose, MatMul, Add, Transpose."""
    source, weight, bias = operand(node), array_of(node.inputs[1]), optional(node, 2)
    strides, pads = (node.attributes.get_ints(name, ()) for name in ("strides", "pads"))
    if weight is None or math.prod(weight.shape[2:]) != 1 or node.attributes.get_int("group", 1) != 1:
        return
    if any(step != 1 for step in strides) or any(pads):
        return
    rank = weight.ndim
    rows = nodes.transpose(source, (0, *range(2, rank), 1))
    product = nodes.matmul(rows, nodes.constant(weight.reshape(weight.shape[:2]).T))
    if bias is not None:
        product = nodes.binary("Add", product, bias)
    put(node.outputs[0], nodes.transpose(product, (0, rank - 1, *range(1, rank - 1))))


def patches(conv: ir.Node) -> tuple[ir.Value, np.ndarray] | None:
    """The patch that each output pixel of a convolution reads (B, pixels, patch), and the weights (patch, C) that map
    it to the pixel, without the bias. None if a patch is not smaller than its pixel, or with strides, dilations,
    groups or computed padding.
    """
    source, weight = operand(conv), array_of(conv.inputs[1])
    if weight is None or math.prod(weight.shape[1:]) >= len(weight) or conv.attributes.get_int("group", 1) != 1:
        return None
    (outputs, _, *kernel), spatial = weight.shape, weight.ndim - 2
    pads = conv.attributes.get_ints("pads", (0,) * 2 * spatial)
    plain = [conv.attributes.get_ints(name, (1,) * spatial) for name in ("strides", "dilations")]
    computed_pads = conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    if computed_pads or any(step != 1 for steps in plain for step in steps):
        return None
    nodes = Nodes(conv)
    shifted = [nodes.pad(source, (0, 0, *pads[:spatial], 0, 0, *pads[spatial:]))]
    for axis, (extent, size) in enumerate(zip(sizes(conv.outputs[0])[2:], kernel, strict=True), start=2):
        shifted = [nodes.slice(one, axis, at, at + extent) for one in shifted for at in range(size)]
    joined = nodes.concat(shifted, 1)
    count, width = sizes(joined)[:2]
    rows = nodes.transpose(nodes.reshape(joined, (count, width, -1)), (0, 2, 1))
    return rows, np.moveaxis(weight, (0, 1), (-1, -2)).reshape(width, outputs)


def _layer_norm(nodes: Nodes, node: ir.Node) -> None:
    """(x - mean) / sqrt(variance + ε), as exporters write it -> LayerNormalization with γ = 1, β = 0."""
    centred, root = made_by(node.inputs[0], "Sub"), made_by(node.inputs[1], "Sqrt", "Pow")
    if centred is None or root is None or (root.op_type == "Pow" and number(root.inputs[1]) != 0.5):
        return
    added, mean = made_by(root.inputs[0], "Add"), made_by(centred.inputs[1], "ReduceMean")
    source = centred.inputs[0]
    if added is None or mean is None or source is None or mean.inputs[0] is not source or not _over_last(mean):
        return
    epsilon, variance = number(added.inputs[1]), made_by(added.inputs[0], "ReduceMean")
    if epsilon is None:
        epsilon, variance = number(added.inputs[0]), made_by(added.inputs[1], "ReduceMean")
    if epsilon is None or variance is None or not _over_last(variance):
        return
    square = made_by(variance.inputs[0], "Pow", "Mul")
    if square is None or (
        square.inputs[0] is not square.inputs[1] if square.op_type == "Mul" else number(square.inputs[1]) != 2
    ):
        return
    base = made_by(square.inputs[0], "Sub")
    if base is None or base.inputs[0] is not source or base.inputs[1] is not mean.outputs[0]:
        return
    width = sizes(source)[-1]
    operands = [source, nodes.constant(np.ones(width)), nodes.constant(np.zeros(width))]
    put(node.outputs[0], nodes.make("LayerNormalization", operands, sizes(source), axis=-1, epsilon=epsilon))


def _over_last(node: ir.Node) -> bool:
    rank = len(sizes(operand(node)))
    axes = integers(node, 1) or []
    return [axis % rank for axis in axes] == [rank - 1] and node.attributes.get_int("keepdims", 1) == 1


def _affine_norm(nodes: Nodes, node: ir.Node) -> None:
    """LayerNormalization(x, 1, 0) · γ + β -> LayerNormalization(x, γ, β)."""
    scale, shift, shape = array_of(node.inputs[1]), array_of(optional(node, 2)), sizes(node.outputs[0])
    if not over_last(node) or scale is None or not np.all(scale == 1) or (shift is not None and np.any(shift)):
        return
    last, found = node, {"Mul": scale, "Add": np.zeros_like(scale)}
    for operator in ("Mul", "Add"):
        user = only_reader(last.outputs[0])
        if user is None or user.op_type != operator:
            break
        other = next((one for one in user.inputs if one is not last.outputs[0]), None)
        array = array_of(other)
        if array is None or array.shape != scale.shape:
            break
        found[operator], last = array, user
    if last is not node:
        nodes = Nodes(last, node)
        operands = [node.inputs[0], nodes.constant(found["Mul"]), nodes.constant(found["Add"])]
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        put(last.outputs[0], nodes.make("LayerNormalization", operands, shape, axis=-1, epsilon=epsilon))


def _neutral(nodes: Nodes, node: ir.Node) -> None:
    """x + 0 and x · 1 -> x."""
    neutral = float(node.op_type == "Mul")
    for index in (0, 1):
        array, other = array_of(node.inputs[index]), operand(node, 1 - index)
        if array is None or node.outputs[0].is_graph_output():
            continue
        if sizes(other) == sizes(node.outputs[0]) and np.all(array == neutral):
            node.outputs[0].replace_all_uses_with(other)
            return


def _sliced_rows(nodes: Nodes, node: ir.Node) -> None:
    """Some columns of rows looked up in a constant -> rows looked up in these columns of it."""
    found = made_by(node.inputs[0], "Gather")
    rows = None if found is None else array_of(found.inputs[0])
    axes, starts, ends, steps = (integers(node, index) for index in (3, 1, 2, 4))
    if found is None or rows is None or rows.ndim != 2 or found.attributes.get_int("axis", 0) != 0:
        return
    if axes is None or starts is None or ends is None or steps not in (None, [1]):
        return
    if [axis % len(sizes(node.outputs[0])) for axis in axes] != [len(sizes(node.outputs[0])) - 1]:
        return
    columns = nodes.constant(rows[:, starts[0] : ends[0]])
    put(node.outputs[0], nodes.look_up(columns, operand(found, 1)))


def as_slices(split: ir.Node) -> None:
    """Replace a Split with Slices: nodes of a region have one output."""
    nodes, axis = Nodes(split), axis_of(split, len(sizes(operand(split))), 0)
    for value, steps in places(list(split.outputs), axis):
        put(value, nodes.slice(operand(split), axis, steps.start, steps.stop))


_Rules = dict[str, Callable[[Nodes, ir.Node], None]]
_RULES: _Rules = {
    "Gemm": _gemm,
    "MatMul": _vectors,
    "Einsum": _einsum,
    "Conv": _pointwise,
    "Div": _layer_norm,
    "Add": _neutral,
    "Slice": _sliced_rows,
    "Mul": _neutral,
}
_NORMS: _Rules = {"LayerNormalization": _affine_norm}  # after decomposed norms were found
