# SPDX-License-Identifier: Apache-2.0
"""Products with constant matrices in another order: consecutive linear layers, and the projection after a read.

tail     (Σ_i F_i A_i) W = Σ_i F_i (A_i W)        consecutive linear layers become one product
output   (P V) W = P (V W)                        each head's part of W is applied to its values, which are few
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from perceiver_export.exporter.fold.layout import Layout, extent, joined, layout_of, row_major
from perceiver_export.exporter.fold.nodes import Nodes, Sizes, array_of, is_foldable, operand, put, sizes
from perceiver_export.exporter.fold.normalize import Constants
from perceiver_export.exporter.fold.rowform import Forms, RowForm
from perceiver_export.exporter.fold.sites import Work, cost_of, decided, unneeded
from perceiver_export.exporter.fold.tables import Matrix
from perceiver_export.runtimes.manifest import FoldDecision

_TAIL = "consecutive linear layers become one product"
_OUTPUT = "the projection after it is applied to its values, which are fewer"


def linear_layers(graph: ir.Graph) -> Iterator[tuple[ir.Node, np.ndarray]]:
    """Products with a constant matrix, the last first."""
    for node in reversed(list(graph)):
        weight = array_of(node.inputs[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.ndim == 2 and is_foldable(node):
            yield node, weight


def fold_tails(graph: ir.Graph, real: Sizes, least_gain: int, batch: int) -> list[FoldDecision]:
    """Merge consecutive linear layers, also beside a residual, into one product per changing input."""
    found: list[FoldDecision] = []
    forms = Forms(Constants(real))  # the last layers come first: the nodes before each are still unchanged
    for node, weight in linear_layers(graph):
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            continue
        source = operand(node)
        choices = [(*_tail_costs(node, form, real), form) for form in forms.of(source)[1:] if _is_sum(form)]
        if not choices:
            continue
        plain, new, form = max(choices, key=lambda one: one[0].gain(one[1]))
        pays = plain.gain(new) > least_gain
        found.append(decided(node, plain, new, pays, _TAIL, batch))
        if pays:
            _write_tail(node, form, weight)
    return found


def _is_sum(form: RowForm) -> bool:
    """Whether a form has only products and a constant row, and no norm."""
    return bool(form.terms) and form.table.is_row and form.norm is None


def _tail_costs(node: ir.Node, form: RowForm, real: Sizes) -> tuple[Work, Work]:
    result = sizes(node.outputs[0])
    rows, width = real.count(result[:-1]), result[-1]
    plain = cost_of(unneeded([operand(node)], {node}, form.reads) | {node}, real)
    product = 2 * rows * form.columns * width
    return plain, Work(product, 4 * rows * (form.columns + len(form.terms) * 2 * width), product)


def _write_tail(node: ir.Node, form: RowForm, weight: np.ndarray) -> None:
    nodes, result = Nodes(node), node.outputs[0]

    def product(value: ir.Value, matrix: Matrix) -> ir.Value:
        # quantization knows a residual by this name, and keeps it in float
        constant = nodes.constant(matrix.value() @ weight, ".direct" if matrix.at is not None else "")
        return nodes.matmul(nodes.matrix(value), constant)

    total = nodes.summed(itertools.starmap(product, form.terms))
    table = form.times(weight).without_bias().table
    if table.tables and np.any(row := table.tables[0].value()[0]):
        total = nodes.binary("Add", total, nodes.constant(row))
    put(result, nodes.reshape(total, sizes(result)))


def fold_outputs(graph: ir.Graph, real: Sizes, least_gain: int, batch: int) -> list[FoldDecision]:
    """Apply the projection after a read of probabilities to the values, where these are fewer."""
    found: list[FoldDecision] = []
    for node, weight in linear_layers(graph):
        source = operand(node)
        layout = layout_of(source)
        read = layout.source.producer()
        # Normalization has given vectors an axis.
        if read is None or read.op_type != "MatMul" or not is_foldable(read) or array_of(read.inputs[1]) is not None:
            continue
        heads = _heads(layout, read)
        if heads is None or len(set(layout.source.consumers())) != 1:
            continue
        plain, new = _output_costs(read, heads, weight.shape[1], real)
        pays = plain.gain(new) > least_gain
        found.append(decided(node, plain, new, pays, _OUTPUT, batch))
        if pays:
            _write_output(node, read, heads, weight * layout.scale)
    return found


def _heads(layout: Layout, read: ir.Node) -> int | None:
    """The number of heads whose reads (…, h, m, d) ``layout`` places side by side in its rows; None if it does not."""
    (*lead, count, depth), last = sizes(layout.source), layout.axes[-1]
    leading = [atom for axis in layout.axes[:-1] for atom in axis]
    if layout.offset or last[-1:] != [(depth, 1)] or (count > 1 and leading[-1:] != [(count, depth)]):
        return None
    heads, whole = extent(last) // depth, math.prod(lead)
    samples, head, row, column = row_major((whole // heads, heads, count, depth))
    if whole % heads or layout.flat != [joined(samples + row), joined(head + column)]:
        return None
    probabilities, values = (sizes(one) for one in read.inputs if one is not None)
    return heads if math.prod(values[:-2]) == math.prod(probabilities[:-2]) == whole else None


def _output_costs(read: ir.Node, heads: int, width: int, real: Sizes) -> tuple[Work, Work]:
    (*lead, count, depth), few = sizes(read.outputs[0]), sizes(operand(read))[-1]
    samples, few, count = real.count(lead) // heads, real.real(few), real.real(count)
    inner = 2 * samples * count * heads * depth
    plain = Work(inner * (few + width), 4 * samples * count * (2 * heads * depth + width), inner * width)
    passes = 2 * heads + 1 if heads > 1 else 1
    product, of_weights = 2 * samples * count * heads * few * width, 2 * samples * heads * few * depth * width
    return plain, Work(product + of_weights, 4 * samples * count * width * passes, of_weights)


def _write_output(node: ir.Node, read: ir.Node, heads: int, weight: np.ndarray) -> None:
    probabilities, values = operand(read), operand(read, 1)
    (*_, count, few), (*lead, _, depth) = sizes(probabilities), sizes(values)
    samples, nodes = math.prod(lead) // heads, Nodes(node)
    apart = nodes.reshape(values, (samples, heads, few, depth))
    wide = nodes.matmul(apart, nodes.constant(weight.reshape(heads, depth, -1)))
    if heads > 1:
        read_all = nodes.matmul(nodes.reshape(probabilities, (samples, heads, count, few)), wide)
        made = nodes.sum(read_all, [1])
    else:
        wide = nodes.reshape(wide, (samples, few, weight.shape[1]))
        made = nodes.matmul(nodes.reshape(probabilities, (samples, count, few)), wide)
    put(node.outputs[0], nodes.reshape(made, sizes(node.outputs[0])))
