# SPDX-License-Identifier: Apache-2.0
"""Properties of scores before a softmax, and of probabilities after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from perceiver_export.exporter.fold.nodes import (
    VIEWS,
    Nodes,
    axis_of,
    factor_of,
    made_by,
    only_reader,
    operand,
    over_last,
    put,
    shape_of,
    sizes,
)
from perceiver_export.exporter.fold.rowform import RowForm
from perceiver_export.exporter.fold.sites import Site

_FOLLOWED = 12  # nodes between a product and its softmax


def shared_norms(chosen: Iterable[tuple[Site, RowForm]]) -> dict[tuple[ir.Node, int], float]:
    """Scores and reads of one softmax that share σ and their columns, with the factor between scores and softmax."""
    reads = {site.node: form for site, form in chosen if site.kind == "read"}
    shared: dict[tuple[ir.Node, int], float] = {}
    for site, form in chosen:
        if site.kind != "scores" or site.side != 1 or form.norm is None:
            continue
        node, factor = _softmax_read(site.node)
        if node not in reads or factor <= 0:
            continue
        other = reads[node]
        if other.norm is not None and other.norm.node is form.norm.node and other.values == form.values:
            shared[site.node, 1] = shared[node, 1] = factor
    return shared


def _softmax_read(node: ir.Node) -> tuple[ir.Node | None, float]:
    """The only product that reads the softmax of a product's scores, and the factor of the scores before it."""
    factor, softmax = 1.0, False
    for value, user in _readers(node.outputs[0]):
        if user.op_type == "MatMul" and softmax and user.inputs[0] is value:
            return user, factor
        if user.op_type == "Softmax" and not softmax and over_last(user):
            softmax = True
        elif user.op_type in ("Mul", "Div") and not softmax and (found := factor_of(user, value)) is not None:
            factor *= found
        elif user.op_type not in (*VIEWS, "Dropout") or sizes(user.outputs[0])[-1] != sizes(value)[-1]:
            break
    return None, factor


def _readers(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Node]]:
    """A value with its only reader, the reader's result with its own, and so on."""
    for _ in range(_FOLLOWED):
        user = only_reader(value)
        if user is None:
            return
        yield value, user
        value = user.outputs[0]


def reaches_softmax(node: ir.Node) -> bool:
    """Whether scores go only into a softmax over the rows' axis, through nodes after which a term of the query alone
    still cancels.
    """
    for value, user in _readers(node.outputs[0]):
        if user.op_type == "Softmax":
            return over_last(user)
        scaled = user.op_type in ("Mul", "Div") and factor_of(user, value) is not None
        added = user.op_type == "Add" and sizes(user.outputs[0]) == sizes(value)
        if not scaled and not added:
            break
    return False


def sums_to_one(weights: ir.Value) -> bool:
    """Whether each row is a softmax over the last axis."""
    while (view := made_by(weights, *VIEWS, "Dropout")) is not None:
        if sizes(operand(view))[-1] != sizes(weights)[-1]:
            return False
        weights = operand(view)
    softmax = made_by(weights, "Softmax")
    return softmax is not None and over_last(softmax)


def drop_single_keys(graph: ir.Graph) -> None:
    """Replace the probabilities of a single key times its value with the value, for each query; scores become unused.

    Besides saving work, this avoids an error of OpenVINO 2026.4, which cannot move int8 scales past a key (N, 1, C, 1).
    """
    for node in list(graph):
        if node.op_type != "MatMul" or node.outputs[0].is_graph_output() or not _has_one_key(operand(node)):
            continue
        value, shape = operand(node, 1), shape_of(node.outputs[0])
        if shape is not None and len(sizes(value)) > 1:
            put(node.outputs[0], Nodes(node).expand(value, shape))


def _has_one_key(weights: ir.Value) -> bool:
    """Whether ``weights`` has one column, made by a softmax over one element."""
    shape = shape_of(weights)
    while (node := made_by(weights, *VIEWS, "Cast", "Dropout")) is not None:
        weights = operand(node)
    softmax, whole = made_by(weights, "Softmax"), shape_of(weights)
    if softmax is None or not shape or not whole:
        return False
    return shape[-1] == 1 and whole[axis_of(softmax, len(whole))] == 1
