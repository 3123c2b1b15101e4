# SPDX-License-Identifier: Apache-2.0
"""Tensors whose rows are ``row_m = s_m (sum_i F_i[m] A_i + T_m) + b``.

F_i are tensors of the graph, A_i constant matrices, T a constant table, s_m one number per row (1/σ of a LayerNorm or
RMSNorm), and b a constant row. The form is closed under products with constant matrices, addition of and multiplication
by constants, both norms over the last axis, concatenation of columns, and views that keep rows whole. Rows that are
looked up in a constant have no changing (input-dependent) terms: their table is read at indices.

    LayerNorm(F A + T) = s (F A C_0 γ + T C_0 γ) + β        C_0 = I − 11ᵀ/C,  s_m = 1/σ_m

A tensor has several forms, depending on how far back the graph is followed: the tensor itself, the input of the linear
layer that made it, and so on. Matrices are products that are computed only when a site needs them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from perceiver_export.exporter.fold.layout import layout_of, row_major
from perceiver_export.exporter.fold.nodes import (
    VIEWS,
    Shape,
    array_of,
    axis_of,
    is_known,
    made_by,
    operand,
    shape_of,
    sizes,
)
from perceiver_export.exporter.fold.normalize import Constants, patches
from perceiver_export.exporter.fold.tables import ZERO, Matrix, Table

_MOST_FORMS, _MOST_TERMS = 8, 3
_SUMMED_FORMS = 3  # tried for each side of an addition


@dataclass(frozen=True)
class Norm:
    """1/σ of a LayerNorm: one number per row of its input, whose form is ``form``.

    ``inverse``: the graph's own value of 1/σ, which a decomposed RMSNorm has.
    """

    node: ir.Node
    form: RowForm
    epsilon: float = 0.0
    inverse: ir.Value | None = None

    @property
    def changing(self) -> np.ndarray | None:
        """A mask of the changing columns if they stand unmodified beside constant ones, so that σ follows from them."""
        table, mask = self.form.table, np.zeros(self.form.width, bool)
        for _, matrix in self.form.terms:
            if matrix.at is None:
                return None
            mask[matrix.at : matrix.at + matrix.rows] = True
        return mask if self.inverse is None and table.tables and table.only(~mask) else None

    def reads(self) -> list[ir.Value]:
        """The values that σ is computed from."""
        if self.inverse is not None:
            return [self.inverse]
        return self.form.values if self.changing is not None else [operand(self.node)]


@dataclass(frozen=True)
class RowForm:
    """Rows over the axes ``lead``, of ``width`` columns.

    ``saves``: whether reading this form can save a product, a norm or a concatenation.
    """

    lead: Shape
    width: int
    terms: tuple[tuple[ir.Value, Matrix], ...]
    table: Table = ZERO
    norm: Norm | None = None
    bias: Matrix | None = None
    saves: bool = False

    @property
    def columns(self) -> int:
        """The number of changing values per row."""
        return sum(matrix.rows for _, matrix in self.terms)

    @property
    def values(self) -> list[ir.Value]:
        return [value for value, _ in self.terms]

    @property
    def reads(self) -> list[ir.Value]:
        own = [*self.values, *self.table.points]
        return own if self.norm is None else own + self.norm.reads()

    def times(self, weight: np.ndarray) -> RowForm:
        """Each row times a matrix (width, columns)."""
        return replace(self._each(lambda one: one @ weight, weight.shape[1]), saves=True)

    def scaled(self, factor: np.ndarray | float) -> RowForm:
        """Each column times a number."""
        own = np.broadcast_to(np.asarray(factor, np.float64).reshape(-1), (self.width,))
        return self._each(lambda one: one * own)

    def placed(self, at: int, width: int) -> RowForm:
        """The form as columns ``at`` and following of wider rows."""
        return self._each(lambda one: one.placed(at, width), width)

    def shifted(self, bias: np.ndarray) -> RowForm:
        """Each row plus one constant row."""
        total = Matrix.of(np.broadcast_to(bias.reshape(1, -1), (1, self.width)))
        return replace(self, bias=total if self.bias is None else self.bias + total)

    def normed(self, norm: Norm, scale: np.ndarray, shift: np.ndarray | None) -> RowForm:
        """The form after a LayerNorm; this one must not have a norm."""
        made = self.without_bias()._each(lambda one: one.centred() * scale)
        return replace(made, norm=norm, bias=None if shift is None else Matrix.of(shift.reshape(1, -1)), saves=True)

    def without_bias(self) -> RowForm:
        """The form with its bias moved into the table, which is equal without a norm."""
        if self.bias is None:
            return self
        table = self.table.plus(Table((1,), (self.bias,)))
        assert table is not None
        return replace(self, table=table, bias=None)

    def _each(self, change: Callable[[Matrix], Matrix], width: int | None = None) -> RowForm:
        terms = tuple((value, change(matrix)) for value, matrix in self.terms)
        bias = None if self.bias is None else change(self.bias)
        return replace(self, width=width or self.width, terms=terms, table=self.table.each(change), bias=bias)


def join(left: RowForm, right: RowForm) -> RowForm | None:
    """The sum of two forms of the same rows; None if one is normed, the grids differ, or there are too many terms."""
    if left.norm or right.norm or len(left.terms) + len(right.terms) > _MOST_TERMS:
        return None
    left, right = left.without_bias(), right.without_bias()
    table, saves = left.table.plus(right.table), left.saves or right.saves
    return None if table is None else replace(left, terms=left.terms + right.terms, table=table, saves=saves)


class Forms:
    """The forms of the values of one graph. ``constant`` computes values that do not depend on an input."""

    def __init__(self, constant: Constants) -> None:
        self.constant = constant
        self._known: dict[ir.Value, list[RowForm]] = {}
        self._tables: dict[ir.Value, Table | None] = {}

    def of(self, value: ir.Value) -> list[RowForm]:
        """The tensor itself first, then forms from further back."""
        if value not in self._known:
            shape = sizes(value)
            itself = RowForm(shape[:-1], shape[-1], ((value, Matrix.identity(shape[-1])),))
            self._known[value] = [itself]
            node = value.producer()
            step = None if node is None else _FORMS.get(node.op_type)
            if node is not None and step is not None and is_known(node):
                self._known[value] += itertools.islice(step(self, node, shape), _MOST_FORMS - 1)
        return self._known[value]

    def table(self, value: ir.Value, shape: Shape) -> Table | None:
        """A constant that is added to rows of ``shape``; None if it is not constant or its rows do not fit."""
        if value not in self._tables:
            array = self.constant(value)
            self._tables[value] = None if array is None else Table.of(array, shape)
        return self._tables[value]

    def _matmul(self, node: ir.Node, shape: Shape) -> Iterator[RowForm]:
        weight = array_of(node.inputs[1])
        if weight is not None and weight.ndim == 2:
            yield from (form.times(weight) for form in self.of(operand(node)))

    def _viewed(self, node: ir.Node, shape: Shape) -> Iterator[RowForm]:
        source = operand(node)
        if sizes(source)[-1:] == shape[-1:]:
            for form in self.of(source)[1:]:
                yield replace(form, lead=shape[:-1])

    def _multiplied(self, node: ir.Node, shape: Shape) -> Iterator[RowForm]:
        for index in (1, 0) if node.op_type == "Mul" else (1,):
            factor, source = array_of(node.inputs[index]), operand(node, 1 - index)
            if _divides_rows(node.inputs[index], shape) and sizes(source) == shape:
                yield from self._over_root(node, source, operand(node, index))
            if factor is None or sizes(source) != shape or not _is_row(factor, shape):
                continue
            own = factor.astype(np.float64)
            for form in self.of(source):
                yield form.scaled(own if node.op_type == "Mul" else 1 / own)
            return

    def _over_root(self, node: ir.Node, source: ir.Value, inverse: ir.Value) -> Iterator[RowForm]:
        """RMSNorm: rows times 1/sqrt(mean of squares + ε)."""
        for form in self.of(source):
            if form.norm is None:
                own = form.without_bias()
                yield replace(own, norm=Norm(node, own, inverse=inverse))

    def _added(self, node: ir.Node, shape: Shape) -> Iterator[RowForm]:
        left, right = operand(node), operand(node, 1)
        sign = -1.0 if node.op_type == "Sub" else 1.0
        for source, other, signs in ((left, right, (1.0, sign)), (right, left, (sign, 1.0))):
            if sizes(source) == shape and self.constant(other) is not None:
                for form in self.of(source):
                    own = form if signs[0] > 0 else form.scaled(-1.0)
                    if (made := self._plus(own, other, signs[1], shape)) is not None:
                        yield made
                return
        if sizes(left) == sizes(right) and sign > 0:
            pairs = itertools.product(self.of(left)[:_SUMMED_FORMS], self.of(right)[:_SUMMED_FORMS])
            yield from (made for one, other in pairs if (made := join(one, other)) is not None)

    def _plus(self, form: RowForm, value: ir.Value, sign: float, shape: Shape) -> RowForm | None:
        """A form plus a constant: one row for all, or a table."""
        array = self.constant(value)
        assert array is not None
        if _is_row(array, shape):
            return form.shifted(sign * array)
        table = None if form.norm else self.table(value, shape)
        if table is not None:
            table = form.table.plus(table.each(lambda one: one * sign))
        return None if table is None else replace(form, table=table)

    def _turned(self, node: ir.Node, shape: Shape) -> Iterator[RowForm]:
        """Pixels that were transposed from channels first: the rows that they were made from, or patches."""
        layout = layout_of(node.outputs[0])
        source, own = layout.source, sizes(layout.source)
        if layout.offset == 0 and layout.scale == 1 and layout.flat == row_major((math.prod(own[:-1]), own[-1])):
            for form in self.of(source)[1:]:
                yield replace(form, lead=shape[:-1])
        elif (conv := made_by(source, "Conv")) is not None and shape == (own[0], math.prod(own[2:]), own[1]):
            found = patches(conv)
            if found is not None:
                rows, weight = found
                form = RowForm(shape[:-1], shape[-1], ((rows, Matrix.of(weight)),))
                bias = array_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
                yield form if bias is None else form.shifted(bias)

    def _looked_up(self, node: ir.Node, shape: Shape) -> Iterator[RowForm]:
        """Rows of a constant matrix at indices."""
        rows = array_of(node.inputs[0])
        if rows is not None and rows.ndim == 2 and rows.dtype.kind == "f" and axis_of(node, 2, 0) == 0:
            table = Table((len(rows),), (Matrix.of(rows),), (operand(node, 1),))
            yield RowForm(shape[:-1], shape[-1], (), table)

    def _concat(self, node: ir.Node, shape: Shape) -> Iterator[RowForm]:
        """Columns side by side: each input as it is, then each in its deepest form."""
        if axis_of(node, len(shape), 0) == len(shape) - 1:
            made = (self._side_by_side(node, shape, deep) for deep in (False, True))
            yield from (form for form in made if form is not None)

    def _side_by_side(self, node: ir.Node, shape: Shape, deep: bool) -> RowForm | None:
        """The sum of the inputs' forms, each at its columns."""
        total, at, found_deeper = RowForm(shape[:-1], shape[-1], (), saves=True), 0, False
        for value in node.inputs:
            assert value is not None
            own, constants = sizes(value)[-1], self.table(value, sizes(value))
            forms = [form for form in self.of(value) if form.norm is None]
            form = forms[-1] if deep and forms[-1].columns < own else forms[0]
            found_deeper = found_deeper or form is not forms[0]
            if constants is not None:
                form = RowForm(shape[:-1], own, (), constants)
            made = join(total, form.placed(at, shape[-1]))
            if made is None:
                return None
            total, at = made, at + own
        changes = bool(total.terms or total.table.points)
        return total if changes and (found_deeper or not deep) else None

    def _normed(self, node: ir.Node, shape: Shape) -> Iterator[RowForm]:
        scale, shift = array_of(node.inputs[1]), array_of(node.inputs[2]) if len(node.inputs) > 2 else None
        if scale is None or axis_of(node, len(shape)) != len(shape) - 1:
            return
        epsilon = float(np.float32(node.attributes.get_float("epsilon", 1e-5)))  # as stored in files
        forms = [form for form in self.of(operand(node)) if form.norm is None]
        norms = [Norm(node, form.without_bias(), epsilon) for form in forms]
        narrow = next((norm for norm in norms if norm.changing is not None), None)
        for form, own in zip(forms, norms, strict=True):
            norm = narrow or own
            yield form.normed(norm, scale.astype(np.float64), None if shift is None else shift.astype(np.float64))


def _divides_rows(value: ir.Value | None, shape: Shape) -> bool:
    """Whether a value is one positive number per row: the reciprocal of a square root."""
    node = made_by(value, "Reciprocal")
    return node is not None and made_by(node.inputs[0], "Sqrt") is not None and shape_of(value) == (*shape[:-1], 1)


def _is_row(array: np.ndarray, shape: Shape) -> bool:
    """Whether an array broadcasts to one row of ``shape``."""
    return array.size == 1 or (array.size == shape[-1] and array.shape[-1:] == shape[-1:])


_FORMS: dict[str, Callable[[Forms, ir.Node, Shape], Iterator[RowForm]]] = {
    "MatMul": Forms._matmul,
    **dict.fromkeys((*sorted(VIEWS), "Dropout"), Forms._viewed),
    **dict.fromkeys(("Mul", "Div"), Forms._multiplied),
    **dict.fromkeys(("Add", "Sub"), Forms._added),
    "Concat": Forms._concat,
    "Gather": Forms._looked_up,
    "Transpose": Forms._turned,
    "LayerNormalization": Forms._normed,
}
