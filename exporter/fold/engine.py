# SPDX-License-Identifier: Apache-2.0
"""`fold`: all folds of one graph, and the decision at each site."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import onnx_ir as ir
import onnx_ir.passes.common as common

from perceiver_export.exporter.fold.nodes import Sizes
from perceiver_export.exporter.fold.normalize import Constants, normalize, settle
from perceiver_export.exporter.fold.parts import split_rows
from perceiver_export.exporter.fold.products import fold_outputs, fold_tails
from perceiver_export.exporter.fold.rewrite import Rewriter
from perceiver_export.exporter.fold.rowform import Forms
from perceiver_export.exporter.fold.sites import LEAST_GAIN, choose, cost_of, decided, find_sites
from perceiver_export.exporter.fold.softmax import drop_single_keys
from perceiver_export.runtimes.manifest import FoldDecision


def fold(
    model: ir.Model, real: Sizes | None = None, batch: int = 1, least_gain: int = LEAST_GAIN
) -> tuple[FoldDecision, ...]:
    """Fold a graph of known shapes in place.

    ``real``: the planned sizes of dynamic dimensions. ``batch``: samples per call; decisions are recorded for one
    sample. ``least_gain``: FLOPs that a fold must save to be worth it.
    """
    real = real or Sizes()
    normalize(model, real)
    drop_single_keys(model.graph)
    common.RemoveUnusedNodesPass()(model)
    apart = model.clone()
    decisions = _folded(model, real, batch, least_gain)
    if split_rows(apart.graph):
        settle(apart, real)
        others = _folded(apart, real, batch, least_gain)
        if cost_of(model.graph, real).gain(cost_of(apart.graph, real)) > least_gain:
            model.graph, decisions = apart.graph, others
    return _grouped(decisions)


def _folded(model: ir.Model, real: Sizes, batch: int, least_gain: int) -> list[FoldDecision]:
    tails = fold_tails(model.graph, real, least_gain, batch)
    common.RemoveUnusedNodesPass()(model)
    sites = _fold_sites(model.graph, real, least_gain, batch)
    settle(model, real)
    outputs = fold_outputs(model.graph, real, least_gain, batch)
    settle(model, real)
    return [*sites, *tails, *outputs]


def _fold_sites(graph: ir.Graph, real: Sizes, least_gain: int, batch: int) -> list[FoldDecision]:
    sites, blocked = find_sites(graph, Forms(Constants(real)))
    taken, left = choose(sites, real, least_gain)
    decisions = []
    for choice in (*taken, *left):
        how = "keys and values are never computed" if len(choice.sites) > 1 else "a projection is never computed"
        folded = choice in taken
        decisions.append(decided(choice.sites[0].node, choice.plain, choice.folded, folded, how, batch))
    for node, why in blocked.items():
        one = cost_of([node], real).per_sample(batch)
        decisions.append(FoldDecision(node.name or "", one, one, "plain", f"blocked: {why}"))
    Rewriter().rewrite([(site, choice.form) for choice in taken for site in choice.sites])
    return decisions


def _grouped(decisions: Iterable[FoldDecision]) -> tuple[FoldDecision, ...]:
    """One decision for all equal layers of a model."""
    names: dict[FoldDecision, list[str]] = {}
    for one in decisions:
        names.setdefault(msgspec.structs.replace(one, site=""), []).append(one.site)
    return tuple(
        msgspec.structs.replace(one, site=first + (f" and {len(others)} like it" if others else ""))
        for one, (first, *others) in names.items()
    )
