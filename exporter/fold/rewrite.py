# SPDX-License-Identifier: Apache-2.0
"""The new nodes of a site (formulas in `sites`), and 1/σ from the changing columns alone.

If the scores and the read of one softmax share σ, the division after the softmax moves into it: with
h_m = softmax(score_m − log σ_m), Σ_m p_m x_m / σ_m = Σ_m h_m x_m / Σ_m h_m σ_m. Both need only one more column of a
product that exists anyway: σ log(1/σ) beside the columns of the scores, σ beside those of the read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from perceiver_export.exporter.fold.nodes import Nodes, array_of, put, sizes
from perceiver_export.exporter.fold.rowform import Norm, RowForm
from perceiver_export.exporter.fold.sites import Site
from perceiver_export.exporter.fold.softmax import reaches_softmax, shared_norms, sums_to_one
from perceiver_export.exporter.fold.tables import Table


class Rewriter:
    """Rewrites sites of one graph; 1/σ is computed once for all that share it."""

    def __init__(self) -> None:
        self._inverse: dict[tuple[ir.Node | ir.Value, ...], ir.Value] = {}
        self._one: dict[ir.Value, ir.Value] = {}

    def rewrite(self, chosen: Sequence[tuple[Site, RowForm]]) -> None:
        shared = shared_norms(chosen)
        for site, form in chosen:
            _Rewriting(self, site, form, shared.get((site.node, site.side))).apply()

    def inverse(self, norm: Norm) -> ir.Value:
        """1/σ (rows,), computed before the node that it replaces."""
        key: tuple[ir.Node | ir.Value, ...] = (norm.node, *norm.form.values)
        if key not in self._inverse:
            self._inverse[key] = _inverse_deviation(norm)
        return self._inverse[key]

    def one(self, like: ir.Value, nodes: Nodes) -> ir.Value:
        """The number 1, computed from an input: OpenVINO would add the constants of two axes into one N × M table."""
        if like not in self._one:
            self._one[like] = nodes.make("Sign", [nodes.slice(like, 0, 0, 1)], (1,))
        return self._one[like]


def _inverse_deviation(norm: Norm) -> ir.Value:
    """1/σ from sums of centered squares: nothing cancels if the numbers have a large offset."""
    nodes, form = Nodes(norm.node), norm.form
    count = math.prod(form.lead)
    if norm.inverse is not None:
        return nodes.reshape(norm.inverse, (count,))
    used = norm.changing
    if used is None:
        rows = nodes.reshape(norm.reads()[-1], (count, form.width))
        centred = nodes.binary("Sub", rows, nodes.mean(rows))
        variance = nodes.reshape(nodes.mean(nodes.binary("Mul", centred, centred)), (count,))
        variance = nodes.binary("Add", variance, nodes.constant(np.array(norm.epsilon)))
    else:
        means, squares = form.table.moments(~used)
        known = squares / form.width + norm.epsilon
        if not form.terms:
            return nodes.reshape(_of_rows(nodes, form.table, 1 / np.sqrt(known)), (count,))
        rows = nodes.concat([nodes.matrix(value) for value in form.values])
        # samples × rows: the constants are the same in each sample
        shape = (count,) if form.table.points else (count // len(known), len(known))
        own, constant = int(used.sum()), int((~used).sum())
        mean = nodes.mean(rows)
        centred = nodes.binary("Sub", rows, mean)
        changing = nodes.reshape(nodes.sum(nodes.binary("Mul", centred, centred), [1]), shape)
        apart = nodes.binary("Sub", nodes.reshape(mean, shape), _of_rows(nodes, form.table, means))
        weight = nodes.constant(np.array(own * constant / form.width))
        changing = nodes.binary("Add", changing, nodes.binary("Mul", nodes.binary("Mul", apart, apart), weight))
        changing = nodes.binary("Mul", changing, nodes.constant(np.array(1 / form.width)))
        # Last: OpenVINO 2026.4 wrongly adds a constant that follows a sum if there are several samples.
        variance = nodes.reshape(nodes.binary("Add", changing, _of_rows(nodes, form.table, known)), (count,))
    return nodes.make("Reciprocal", [nodes.make("Sqrt", [variance], (count,))], (count,))


def _of_rows(nodes: Nodes, table: Table, numbers: np.ndarray) -> ir.Value:
    """One number per point of the grid: as stored, or looked up for each row (rows,)."""
    stored = nodes.constant(numbers)
    if not table.points:
        return stored
    flat = table.points[0]
    for size, points in zip(table.sizes[1:], table.points[1:], strict=True):
        assert flat.dtype is not None
        outer = nodes.binary("Mul", flat, nodes.constant(np.array(size, flat.dtype.numpy())))
        flat = nodes.binary("Add", outer, points)
    return nodes.look_up(stored, nodes.reshape(flat, (math.prod(sizes(flat)),)))


class _Rewriting:
    """The rewrite of one site. ``shared``: if the scores and the read share σ, the factor of the scores on their way to
    the softmax.
    """

    def __init__(self, rewriter: Rewriter, site: Site, form: RowForm, shared: float | None) -> None:
        self.rewriter, self.site, self.shared = rewriter, site, shared
        self.nodes = nodes = Nodes(site.node)
        self.batch = [size for size, _ in site.batch]
        self.samples = [size if kind == "row" else 1 for size, kind in site.batch]
        self.one_sample = math.prod(self.samples) == 1
        self.of_keys = site.side == 1  # else of queries; a read, too, has the rows on its right
        self.rows, self.count = site.num_rows, sizes(site.other)[-2 if self.of_keys else -1]
        self.inverse = None if form.norm is None else self._ordered(rewriter.inverse(form.norm))
        self.columns = [self._ordered(nodes.matrix(value)) for value in form.values]
        # (heads or 1, …, columns, depth)
        changing = [matrix.value() for _, matrix in form.terms]
        self.matrix = self._picked(np.concatenate([*changing, np.zeros((0, form.width))]))
        self.bias = None if form.bias is None else self._picked(form.bias.value())
        self.points = form.table.points
        self.grid = (self.rows,) if form.table.is_row or self.points else form.table.sizes
        found = ((axis, table.value()) for axis, table in enumerate(form.table.tables))
        self.tables = [(axis, table) for axis, table in found if np.any(table)]

    def apply(self) -> None:
        result = self.site.node.outputs[0]
        if self.site.kind == "read":
            new = self._read()
        else:
            new = self._scores_of_keys() if self.of_keys else self._scores_of_queries()
        put(result, self.nodes.reshape(new, sizes(result)))

    def _picked(self, matrix: np.ndarray) -> np.ndarray:
        """(r, width) -> (heads or 1, …, r, depth): each head's columns, times the layout's scale; 2-D for one head."""
        found = np.moveaxis(matrix[:, self.site.picks], 0, -2) * self.site.layout.scale
        return found.reshape(found.shape[-2:]) if math.prod(found.shape[:-2]) == 1 else found

    def _ordered(self, rows: ir.Value) -> ir.Value:
        """Rows (R, …) in the order in which the product reads them."""
        if self.site.order is None:
            return rows
        extents, order = self.site.order
        rest = sizes(rows)[1:]
        apart = self.nodes.reshape(rows, (*extents, *rest))
        order = [*order, *range(len(extents), len(extents) + len(rest))]
        return self.nodes.reshape(self.nodes.transpose(apart, order), (math.prod(extents), *rest))

    def _all_columns(self, *more: ir.Value) -> ir.Value:
        """The changing columns of all rows, then ``more`` (R,) or (R, 1): (samples, …, M, C), or (M, C)."""
        beside = [self.nodes.reshape(one, (sizes(one)[0], 1)) for one in more]
        joined = self.nodes.concat([*self.columns, *beside])
        lead = () if self.one_sample else self.samples
        return self.nodes.reshape(joined, (*lead, self.rows, sizes(joined)[-1]))

    def _even(self, more: Sequence[ir.Value], factor: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
        """All columns, and the factor that multiplies them, with one number for each column along ``axis``.

        If columns are joined anyway and their number is odd, one is repeated with zeros as its factor: AMX multiplies
        pairs of bf16 numbers, and OpenVINO 2026.4 does not use it for products of an odd depth.
        """
        shape = list(sizes(factor))
        if shape[axis] % 2 == 0 or len(self.columns) + len(more) == 1:
            return self._all_columns(*more), factor
        shape[axis] = 1
        columns = self._all_columns(*more, self.nodes.slice(self.columns[0], 1, 0, 1))
        return columns, self.nodes.concat([factor, self._filled(0.0, shape)], axis)

    def _filled(self, number: float, shape: Sequence[int]) -> ir.Value:
        """A number in a shape that may contain the batch: if it is dynamic, no constant has that shape."""
        return self.nodes.expand(self.nodes.constant(np.full([1] * len(shape), number)), shape)

    def _sigma(self) -> ir.Value:
        assert self.inverse is not None
        return self.nodes.make("Reciprocal", [self.inverse], sizes(self.inverse))

    def _last_axes(self, count: int, rows: Sequence[int]) -> tuple[int, ...]:
        """The last axes of scores: the rows, in one axis or a grid, and ``count`` of the other operand."""
        return (count, *rows) if self.of_keys else (*rows, count)

    def _scaled(self, scores: ir.Value) -> ir.Value:
        """Scores over the grid times 1/σ."""
        if self.inverse is None:
            return scores
        along = self.nodes.reshape(self.inverse, [*self.samples, *self._last_axes(1, self.grid)])
        return self.nodes.binary("Mul", scores, along)

    def _scores_of_keys(self) -> ir.Value:
        """q (b, N, d) · row_m -> (b, N, M)."""
        nodes, queries = self.nodes, self._queries()

        def project(matrix: np.ndarray) -> ir.Value:
            return nodes.matmul(queries, nodes.constant(np.swapaxes(matrix, -1, -2)))

        keys, more = project(self.matrix), []
        cancels = reaches_softmax(self.site.node)  # a term that does not depend on the row cancels there
        bias = None if self.bias is None or cancels else project(self.bias)
        if self.shared is not None:
            assert self.inverse is not None
            log = nodes.make("Log", [self.inverse], sizes(self.inverse))
            more.append(nodes.binary("Mul", self._sigma(), log))
            keys = nodes.concat([keys, self._filled(1 / self.shared, (*sizes(keys)[:-1], 1))])
        rows, keys = self._even(more, keys, -1)
        *lead, last, columns = range(len(sizes(rows)))
        scores = self._product(keys, nodes.transpose(rows, (*lead, columns, last)))
        scores = self._with_tables(scores, self._spread_keys(project))
        return scores if bias is None else nodes.binary("Add", scores, bias)

    def _spread_keys(self, project: Callable[[np.ndarray], ir.Value]) -> Iterator[ir.Value]:
        """Scores of each axis's table (b, N, size or 1) over the grid."""
        terms = [(axis, project(self._picked(table))) for axis, table in self.tables]
        for index, (axis, term) in enumerate(terms):
            term = self.nodes.reshape(term, (*sizes(term)[:-1], *self._on_grid(axis, sizes(term)[-1])))
            if index < len(terms) - 1 and array_of(term) is not None and self.inverse is not None:
                term = self.nodes.binary("Mul", term, self.rewriter.one(self.inverse, self.nodes))
            yield term

    def _on_grid(self, axis: int, size: int) -> list[int]:
        """The shape in which one axis's numbers broadcast over the grid."""
        return [size if one == axis else 1 for one in range(len(self.grid))]

    def _with_tables(self, scores: ir.Value | None, terms: Iterator[ir.Value]) -> ir.Value:
        """Scores plus terms over the grid, times 1/σ."""
        if self.tables or self.inverse is not None:
            spread = (*self.batch, *self._last_axes(self.count, self.grid))
            own = [] if scores is None else [self.nodes.reshape(scores, spread)]
            scores = self._scaled(self.nodes.summed(itertools.chain(own, terms)))
            scores = self.nodes.reshape(scores, (*self.batch, *self._last_axes(self.count, (self.rows,))))
        assert scores is not None
        return scores

    def _scores_of_queries(self) -> ir.Value:
        """row_m · q (b, d, N) -> (b, M, N). The bias, which σ does not divide, multiplies a column of σ."""
        nodes, keys = self.nodes, self._queries()

        def project(matrix: np.ndarray) -> ir.Value:
            return nodes.matmul(nodes.constant(matrix), keys)

        bias, scores = None if self.bias is None else project(self.bias), None
        if self.columns:
            folded, more = project(self.matrix), []
            if bias is not None and self.inverse is not None:
                more.append(self._sigma())
                wide = nodes.expand(bias, (*sizes(folded)[:-2], *sizes(bias)[-2:]))
                folded, bias = nodes.concat([folded, wide], -2), None
            scores = nodes.matmul(*self._even(more, folded, -2))
        terms = (self._spread(project(self._picked(table)), axis) for axis, table in self.tables)
        scores = self._with_tables(scores, terms)
        return scores if bias is None else nodes.binary("Add", scores, bias)

    def _spread(self, term: ir.Value, axis: int) -> ir.Value:
        """Scores of one axis's table (b, size or 1, N) for all rows: over the grid, or looked up."""
        (*lead, size, count), nodes = sizes(term), self.nodes
        if not self.points:
            return nodes.reshape(term, (*lead, *self._on_grid(axis, size), count))
        points = self.points[axis]
        if self.one_sample:
            return nodes.look_up(term, nodes.reshape(points, (self.rows,)), len(lead))
        samples, heads = math.prod(self.samples), math.prod(self.batch) // math.prod(self.samples)
        wide = nodes.reshape(nodes.expand(term, (*self.batch, size, count)), (samples, heads, size, count))
        flat = nodes.reshape(nodes.transpose(wide, (0, 2, 1, 3)), (samples, size, heads * count))
        at = nodes.cast(nodes.reshape(points, (samples, self.rows, 1)), ir.DataType.INT64)
        found = nodes.make("GatherND", [flat, at], (samples, self.rows, heads * count), batch_dims=1)
        apart = nodes.reshape(found, (samples, self.rows, heads, count))
        return nodes.reshape(nodes.transpose(apart, (0, 2, 1, 3)), (*self.batch, self.rows, count))

    def _queries(self) -> ir.Value:
        """The other operand with the product's leading axes apart, (b, N, d) or (b, d, N), expanded where the rows are
        repeated.
        """
        lead, last = self.site.lead, sizes(self.site.other)[-2:]
        wide = [size if kind == "none" else own for (size, kind), own in zip(self.site.batch, lead, strict=True)]
        return self.nodes.expand(self.nodes.reshape(self.site.other, (*lead, *last)), (*wide, *last))

    def _read(self) -> ir.Value:
        """Σ_m p_m row_m for p (b, N, M) -> (b, N, d)."""
        nodes, other, lead = self.nodes, self.site.other, (*self.batch, self.count)
        weights = nodes.reshape(other, (*lead, self.rows))
        own, rank, norm = weights, len(self.batch), None
        if self.inverse is not None and self.shared is None:
            own = nodes.reshape(self._scaled(nodes.reshape(weights, (*lead, *self.grid))), (*lead, self.rows))
        read = self._product(own, self._all_columns(*([] if self.shared is None else [self._sigma()])))
        if self.shared is not None:
            last = sizes(read)[-1] - 1
            norm = nodes.slice(read, rank + 1, last, last + 1)
            read = nodes.binary("Div", nodes.slice(read, rank + 1, 0, last), norm)
        result = nodes.matmul(read, nodes.constant(self.matrix))
        for axis, table in self.tables:
            result = nodes.binary("Add", result, self._read_table(own, norm, axis, table))
        if self.bias is None:
            return result
        bias = nodes.constant(self.bias)
        if not sums_to_one(other):
            bias = nodes.binary("Mul", self._summed(weights), bias)
        return nodes.binary("Add", result, bias)

    def _summed(self, weights: ir.Value) -> ir.Value:
        """Weights summed over all rows (b, N, 1)."""
        return self.nodes.reshape(self.nodes.sum(weights, [len(self.batch) + 1]), (*self.batch, self.count, 1))

    def _read_table(self, weights: ir.Value, norm: ir.Value | None, axis: int, table: np.ndarray) -> ir.Value:
        """Weights summed over the other axes of the grid, divided by ``norm``, times the table of this axis."""
        first, nodes = len(self.batch) + 1, self.nodes
        if len(table) == 1:
            summed = self._summed(weights)
        else:
            apart = nodes.reshape(weights, (*self.batch, self.count, *self.grid))
            rest = [first + one for one in range(len(self.grid)) if one != axis]
            summed = nodes.sum(apart, rest) if rest else apart
        if norm is not None:
            summed = nodes.binary("Div", summed, norm)
        return nodes.matmul(summed, nodes.constant(self._picked(table)))

    def _product(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """(b, N, K) times rows (samples, K, M); heads join the rows of a sample if samples come first."""
        (*given, count, depth), width = sizes(left), sizes(right)[-1]
        first = sum(size > 1 for size in self.samples)
        lead, rest = self.batch[:first], self.batch[first:]
        if 1 in self.samples[:first]:
            return self.nodes.matmul(left, right)
        flat = self.nodes.reshape(left, (*given[:first], math.prod(rest) * count, depth))
        made = self.nodes.matmul(flat, self.nodes.reshape(right, (*lead, depth, width)))
        return self.nodes.reshape(made, (*self.batch, count, width))
