# SPDX-License-Identifier: Apache-2.0
"""Matrix products that can be re-associated, what that costs, and the decision.

A site is a product with an operand that is a layout of rows in some form. With q, or p in a read, as the other operand,

    scores   q · row_m  =  s_m (q A_iᵀ F_i[m] + q T_mᵀ) + q bᵀ         it contracts the rows' columns
    read     Σ_m p_m row_m  =  (Σ_m p_m s_m F_i[m]) A_i + Σ_m p_m s_m T_m + b Σ_m p_m      it contracts the rows

so that the rows themselves are never computed. All sites of one projection are decided together: it is saved only if
nothing reads it any more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration import graphs
from perceiver_export.exporter.fold.layout import Atom, Axis, Layout, extent, layout_of
from perceiver_export.exporter.fold.nodes import VIEWS, Sizes, array_of, is_foldable, made_by, operand, shape_of, sizes
from perceiver_export.exporter.fold.rowform import Forms, RowForm
from perceiver_export.runtimes.manifest import Cost, FoldDecision

# On a 2-core VNNI Xeon under ONNX Runtime: 430 GFLOP/s in large products, 40 GB/s in element-wise passes.
FLOPS_A_BYTE = 10
# In int8, a linear layer runs about three times as fast; scores and reads stay in float.
_OF_WEIGHTS = 3
_FLOAT = 4
LEAST_GAIN = 1 << 22  # FLOPs; a fraction of a millisecond anywhere
_MOST_AXES = 3  # of a grid: engines take tensors up to rank 6


@dataclass(frozen=True, eq=False)
class Site:
    """One operand of one product. Axes are atoms of the rows' tensor, see `layout`.

    ``batch``: the product's leading axes, with their kinds: `row` (samples), `column` (heads) or `none` (repeated).
    ``lead``: their sizes in the other operand, 1 where it is repeated. ``num_rows`` and ``num_columns``: sizes of the
    last two axes. ``picks`` (heads or 1, …, d): the columns that each head reads. ``order``: (extents, axes) that bring
    the rows into the order in which the product reads them, None if they are in it.
    """

    node: ir.Node
    side: int
    kind: Literal["scores", "read"]
    layout: Layout
    batch: tuple[tuple[int, str], ...]
    lead: tuple[int, ...]
    num_rows: int
    num_columns: int
    picks: np.ndarray
    order: tuple[list[int], list[int]] | None
    forms: list[RowForm]

    @property
    def other(self) -> ir.Value:
        return operand(self.node, 1 - self.side)


def find_sites(graph: ir.Graph, forms: Forms) -> tuple[list[Site], dict[ir.Node, str]]:
    """All sites in the graph's order, and why the other products of two activations are not sites."""
    found: list[Site] = []
    blocked: dict[ir.Node, str] = {}
    for node in graph:
        if node.op_type != "MatMul" or not is_foldable(node):
            continue
        weight = array_of(node.inputs[1])
        if weight is not None and weight.ndim <= 2:
            continue  # a linear layer
        sides = [_site(node, side, forms) for side in (0, 1)]
        found += [site for site in sides if isinstance(site, Site)]
        reasons = [why for why in sides if isinstance(why, str)]
        if len(reasons) == 2:
            blocked[node] = "; ".join(dict.fromkeys(reasons))
    return found, blocked


def _site(node: ir.Node, side: int, forms: Forms) -> Site | str:
    """The site, or why there is none."""
    value = operand(node, side)
    if array_of(value) is not None:
        return "an operand is constant"
    layout = layout_of(value)
    shape = sizes(layout.source)
    if len(shape) < 2 or len(layout.axes) < 2:
        return "an operand is not a matrix"
    width = shape[-1]
    result, other = sizes(node.outputs[0])[:-2], sizes(operand(node, 1 - side))[:-2]
    *batch, first, second = (_split(axis, width) for axis in layout.axes)
    batch = [[]] * (len(result) - len(batch)) + batch
    batch = [axis or ([(size, 0)] if size > 1 else []) for axis, size in zip(batch, result, strict=True)]
    other = (1,) * (len(result) - len(other)) + other
    contracted, free = (second, first) if side == 0 else (first, second)
    scores = _all(contracted, "column", width) and _all(free, "row", width)
    read = _all(contracted, "row", width) and _all(free, "column", width) and side == 1
    leading = [atom for axis in batch for atom in axis]
    if not (scores or read) or any(_kind(atom, width) == "mixed" for atom in leading):
        return "a view mixes rows and columns"
    columns, rows = (contracted, free) if scores else (free, contracted)
    order = _order([atom for atom in leading if _kind(atom, width) == "row"] + rows, math.prod(shape[:-1]), width)
    if order is None or layout.offset >= width:
        return "only some of the rows are read"
    _, *made = forms.of(layout.source)
    if not any(form.saves for form in made):
        return _reason(layout.source)
    if not scores and other != result:
        return "probabilities are repeated"
    pairs = zip(batch, other, strict=True)
    lead = tuple(size if there > 1 else 1 for axis, there in pairs for size, _ in axis)
    named = tuple((size, _kind((size, stride), width)) for size, stride in leading)
    picks = _picks(leading, columns, layout.offset, width)
    kind: Literal["scores", "read"] = "scores" if scores else "read"
    moved = None if order[1] == sorted(order[1]) else order
    return Site(node, side, kind, layout, named, lead, extent(rows), extent(columns), picks, moved, made)


def _kind(atom: Atom, width: int) -> str:
    size, stride = atom
    if stride == 0:
        return "none"
    if size * stride <= width:
        return "column"
    return "row" if stride % width == 0 else "mixed"


def _split(axis: Axis, width: int) -> Axis:
    """Split an atom that spans rows and columns, such as nn.MultiheadAttention's samples × heads, into one of each."""
    made: Axis = []
    for size, stride in axis:
        if 0 < stride < width < size * stride and width % stride == 0 and size * stride % width == 0:
            made += [(size * stride // width, width), (width // stride, stride)]
        else:
            made.append((size, stride))
    return made


def _all(axis: Iterable[Atom], kind: str, width: int) -> bool:
    return all(_kind(atom, width) == kind for atom in axis)


def _order(rows: list[Atom], count: int, width: int) -> tuple[list[int], list[int]] | None:
    """Extents of the source's rows and the axes that give the product's order; None if some rows are left out."""
    falling = sorted(range(len(rows)), key=lambda index: -rows[index][1])
    left = count
    for index in falling:
        left //= rows[index][0]
        if rows[index][1] != left * width:
            return None
    extents, axes = [rows[index][0] for index in falling], [falling.index(index) for index in range(len(rows))]
    return (extents, axes) if left == 1 else None


def _picks(leading: list[Atom], columns: list[Atom], offset: int, width: int) -> np.ndarray:
    own = [atom if _kind(atom, width) == "column" else (1, 0) for atom in leading] + list(columns)
    picks = np.asarray(sum(np.ix_(*(np.arange(size) * stride for size, stride in own))) + offset)
    return picks.reshape(*picks.shape[: len(leading)], -1)


def _reason(source: ir.Value) -> str:
    """Why rows have no form but themselves."""
    node = source.producer()
    if node is None:
        return "an operand is an input of the graph"
    if made_by(source, "Softmax") is not None:
        return "an operand is a softmax"
    makers = (value.producer() for value in node.inputs if value is not None)
    operators = {maker.op_type for maker in makers if maker is not None}
    if node.op_type in ("Add", "Sub", "Concat") and operators & {"Mul", "Neg"}:
        return "rotary positions or another product of activations"
    if node.op_type in ("Div", "Mul"):
        return "rows are divided by their norm, or multiplied by an activation"
    return f"{node.op_type} makes the rows"


class Work(Cost, frozen=True):
    """A cost. ``of_weights``: its FLOPs in linear layers, which can be quantized."""

    of_weights: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.of_weights + other.of_weights)

    def per_sample(self, batch: int) -> Cost:
        return Cost(self.flops // batch, self.bytes // batch)

    @property
    def in_floats(self) -> int:
        """FLOPs, plus the bytes converted to FLOPs."""
        return self.flops + FLOPS_A_BYTE * self.bytes

    @property
    def in_int8(self) -> int:
        return self.in_floats - self.of_weights + self.of_weights // _OF_WEIGHTS

    def gain(self, new: Work) -> int:
        """FLOPs that ``new`` saves in float; if it costs more in int8, the smaller of the two gains."""
        floats, int8 = self.in_floats - new.in_floats, self.in_int8 - new.in_int8
        return floats if int8 >= 0 else min(floats, int8)


def node_flops(node: ir.Node, real: Sizes) -> int:
    """Multiply-adds of products, times 2."""
    counted = node.op_type in ("MatMul", "Conv") and shape_of(node.outputs[0]) is not None
    return real.real(graphs.node_flops(node)) if counted else 0


def cost_of(nodes: Iterable[ir.Node], real: Sizes) -> Work:
    """FLOPs, and the bytes of activations that are read and written."""
    flops = of_weights = numbers = 0
    for node in nodes:
        own = node_flops(node, real)
        flops += own
        of_weights += own if node.op_type == "MatMul" and array_of(node.inputs[1]) is not None else 0
        if node.op_type in VIEWS:
            continue
        for value in (*node.inputs, *node.outputs):
            shape = shape_of(value)
            if shape is not None and array_of(value) is None:
                numbers += real.count(shape)
    return Work(flops, numbers * _FLOAT, of_weights)


def unneeded(values: Iterable[ir.Value], without: Collection[ir.Node], kept: Iterable[ir.Value]) -> set[ir.Node]:
    """Nodes that are unneeded once the nodes ``without`` no longer read ``values``; ``kept`` are still read."""
    dead: set[ir.Node] = set()
    keep = {value.producer() for value in kept}
    left = [node for value in values if (node := value.producer()) is not None]
    while left:
        node = left.pop()
        if node in dead or node in keep or any(result.is_graph_output() for result in node.outputs):
            continue
        if all(user in dead or user in without for result in node.outputs for user in result.consumers()):
            dead.add(node)
            left += [made for value in node.inputs if value is not None and (made := value.producer()) is not None]
    return dead


def folded_cost(site: Site, form: RowForm, real: Sizes) -> Work | None:
    """The cost of the nodes that would replace a site; None if they cannot be made."""
    table, axes = form.table, len(form.table.sizes)
    if table.points and (site.kind, site.side) != ("scores", 0):
        return None
    fits = bool(table.points) or table.rows == site.num_rows
    if axes > _MOST_AXES or (not table.is_row and (site.order or not fits)):
        return None
    total = real.count(sizes(site.node.outputs[0]))
    rows, columns = real.real(site.num_rows), real.real(site.num_columns)
    queries = total // (rows if site.kind == "scores" else columns)  # of all samples and heads
    fixed = array_of(site.other) is not None and site.kind == "scores"
    of_weights = 0 if fixed else 2 * queries * columns * (form.columns + sum(table.sizes))
    normed = form.norm is not None
    all_rows = real.count(form.lead)
    # each axis of a table is added to the scores, or needs a sum over the other axes of the read's weights
    numbers = queries * rows * (1 + 2 * normed + (2 if site.kind == "scores" else 1) * axes)
    numbers += all_rows * form.columns * 2 * (1 + normed) + 3 * all_rows * normed
    return Work(2 * queries * rows * form.columns + of_weights, numbers * _FLOAT, of_weights)


@dataclass(frozen=True, eq=False)
class Choice:
    """All sites that read one tensor, its cheapest form, and what both ways cost."""

    sites: tuple[Site, ...]
    form: RowForm
    plain: Work
    folded: Work

    @property
    def gain(self) -> int:
        return self.plain.gain(self.folded)


def choose(sites: Iterable[Site], real: Sizes, least_gain: int) -> tuple[list[Choice], list[Choice]]:
    """The choices to fold, the largest gain first, and those to leave. Sites of one tensor are decided together."""
    groups: dict[ir.Value, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.layout.source, []).append(site)
    best = {source: _best(group, real) for source, group in groups.items()}
    taken: list[Choice] = []
    while True:
        source, choice = max(best.items(), key=lambda one: one[1].gain if one[1] else -math.inf, default=(None, None))
        if source is None or choice is None or choice.gain <= least_gain:
            return taken, [one for one in best.values() if one is not None]
        taken.append(choice)
        del best[source]
        # A product is rewritten once: groups that share one with this choice gain less now.
        nodes = {site.node for site in choice.sites}
        for other in [one for one in best if any(site.node in nodes for site in groups[one])]:
            groups[other] = [site for site in groups[other] if site.node not in nodes]
            best[other] = _best(groups[other], real) if groups[other] else None


def _best(group: list[Site], real: Sizes) -> Choice | None:
    nodes = {site.node for site in group}
    operands = [operand(site.node, site.side) for site in group]
    products = cost_of(nodes, real)
    choices = []
    for form in group[0].forms:
        costs = [folded_cost(site, form, real) for site in group]
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(costs):
            continue
        saved = cost_of(unneeded(operands, nodes, form.reads), real)
        choices.append(Choice(tuple(group), form, products + saved, sum(known, Work(0, 0))))
    return max(choices, key=lambda one: one.gain, default=None)


def decided(node: ir.Node, plain: Work, new: Work, folded: bool, how: str, batch: int) -> FoldDecision:
    """A decision as the manifest records it, for one sample. ``how``: the effect of the fold."""
    one, other = plain.per_sample(batch), new.per_sample(batch)
    ratio = plain.in_floats / max(new.in_floats, 1)
    if folded:
        why = f"{how}: {ratio:.1f} times less work"
    elif ratio > 1 and plain.gain(new) <= 0:
        saved = (one.flops - other.flops) / 1e6
        why = f"folding would save {saved:.2f} MFLOP, but the rest multiplies two activations: slower in int8"
    elif ratio > 1:
        kind, unit = ("flops", "MFLOP") if other.flops < one.flops else ("bytes", "MB")
        before, after = (getattr(cost, kind) / 1e6 for cost in (one, other))
        why = f"folding would save only {before - after:.2f} of {before:.2f} {unit}"
    else:
        why = f"folding would take {1 / ratio:.1f} times the work"
    return FoldDecision(node.name or "", one, other, "folded" if folded else "plain", why)
