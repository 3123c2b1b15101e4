# SPDX-License-Identifier: Apache-2.0
"""Constant matrices and tables, computed when they are needed.

A table of constant rows on a grid is stored as one small table per axis if it is their sum, as Fourier positions are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from perceiver_export.exporter.fold.nodes import Shape

_TOLERANCE = 1e-6  # of the largest number; positions come in float32
_PROBES = 48


@dataclass(frozen=True, eq=False)
class Matrix:
    """A constant matrix (rows, columns); ``value`` computes it in float64."""

    rows: int
    columns: int
    value: Callable[[], np.ndarray]
    at: int | None = None  # the first column, if its rows are the unit vectors of consecutive columns

    @classmethod
    def of(cls, array: np.ndarray) -> Matrix:
        rows, columns = array.shape
        return cls(rows, columns, lambda: array.astype(np.float64))

    @classmethod
    def identity(cls, size: int) -> Matrix:
        return cls(size, size, lambda: np.eye(size), at=0)

    def __matmul__(self, weight: np.ndarray) -> Matrix:
        if self.at == 0 and self.rows == self.columns:
            return Matrix.of(weight)
        return self._then(lambda own: own @ weight.astype(np.float64), weight.shape[1])

    def __mul__(self, factor: np.ndarray | float) -> Matrix:
        return self._then(lambda own: own * factor)

    def __add__(self, other: Matrix) -> Matrix:
        return self._then(lambda own: own + other.value())

    def centred(self) -> Matrix:
        """Each row minus its mean."""
        return self._then(lambda own: own - own.mean(1, keepdims=True))

    def placed(self, at: int, width: int) -> Matrix:
        """The matrix as columns ``at`` and following of a wider one."""
        made = self._then(lambda own: np.pad(own, ((0, 0), (at, width - at - own.shape[1]))), width)
        return made if self.at is None else replace(made, at=self.at + at)

    def _then(self, step: Callable[[np.ndarray], np.ndarray], columns: int | None = None) -> Matrix:
        return Matrix(self.rows, columns or self.columns, lambda: step(self.value()))


@dataclass(frozen=True, eq=False)
class Table:
    """``row[m] = sum_a tables[a][i_a]`` for each point m of a grid of ``sizes``; sizes (1,): one row for all, (): zero.

    ``points``: if rows are looked up, the indices i_a of all rows, one value of the graph per axis.
    """

    sizes: Shape
    tables: tuple[Matrix, ...]
    points: tuple[ir.Value, ...] = ()

    @classmethod
    def of(cls, array: np.ndarray, shape: Shape) -> Table | None:
        """A constant that broadcasts to ``shape``, as rows of its last axes; equal samples count once.

        None if the last axis is broadcast, or the rows are not a sum over the axes of a grid.
        """
        array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
        if array.shape[-1] != shape[-1]:
            return None
        for axis in range(array.ndim - 1):
            if array.shape[axis] == 1:
                continue
            first = np.take(array, [0], axis)
            if array.strides[axis] != 0 and not (
                axis == 0 and np.array_equal(array, np.broadcast_to(first, array.shape))
            ):
                array = np.broadcast_to(array, array.shape[:axis] + shape[axis:])
                break
            array = first
        rows = array.reshape(-1, shape[-1])
        return cls((1,), (Matrix.of(rows),)) if len(rows) == 1 else _separated(rows)

    @property
    def rows(self) -> int:
        return math.prod(self.sizes)

    @property
    def is_row(self) -> bool:
        return self.sizes in ((), (1,))

    def each(self, change: Callable[[Matrix], Matrix]) -> Table:
        """The table with a linear change of every row."""
        return replace(self, tables=tuple(map(change, self.tables)))

    def plus(self, other: Table) -> Table | None:
        """The sum; None if the grids differ."""
        if not self.tables or not other.tables:
            return self if self.tables else other
        if self.is_row or other.is_row:
            row, grid = (self, other) if self.is_row else (other, self)
            return replace(grid, tables=(grid.tables[0] + row.tables[0], *grid.tables[1:]))
        if self.points and other.points:
            return self._also_at(other)
        if self.sizes != other.sizes or self.points or other.points:
            return None
        return replace(self, tables=tuple(one + more for one, more in zip(self.tables, other.tables, strict=True)))

    def _also_at(self, other: Table) -> Table:
        """The sum of looked-up rows, whose indices are the same or others."""
        found = dict(zip(self.points, zip(self.sizes, self.tables, strict=True), strict=True))
        for points, size, table in zip(other.points, other.sizes, other.tables, strict=True):
            found[points] = (size, found[points][1] + table) if points in found else (size, table)
        sizes, tables = zip(*found.values(), strict=True)
        return Table(sizes, tables, tuple(found))

    def only(self, columns: np.ndarray) -> bool:
        """Whether all columns outside the mask are zero."""
        return bool(columns.all()) or not any(np.any(table.value()[:, ~columns]) for table in self.tables)

    def moments(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each row, over the columns of a mask: the mean, and the sum of squared deviations from it.

        The square of a sum over axes is a sum over pairs of axes, so the rows of the whole grid are never made.
        """
        mean, square = (np.zeros(self.sizes) for _ in range(2))
        centred = []
        for axis, table in enumerate(self.tables):
            own = table.value()[:, columns]
            mean += self._along(own.mean(1), axis)
            centred.append(own - own.mean(1, keepdims=True))
            square += self._along((centred[-1] ** 2).sum(1), axis)
            for other in range(axis):
                square += self._along(2 * centred[other] @ centred[axis].T, other, axis)
        return mean.reshape(-1), square.reshape(-1)

    def _along(self, array: np.ndarray, *axes: int) -> np.ndarray:
        """An array over some axes of the grid, in a shape that can be added to one over all axes."""
        return array.reshape([size if axis in axes else 1 for axis, size in enumerate(self.sizes)])


ZERO = Table((), ())


def _separated(rows: np.ndarray) -> Table | None:
    """A table of rows (M, C) as a sum over the axes of a grid: found numerically, checked at every row; None if it is
    no such sum. The check is in float64, with few rows at a time in memory.
    """
    count, scale = len(rows), max(float(rows.max()), -float(rows.min()), 1e-30)
    probes = np.random.default_rng(0)
    factors = (size for size in range(2, count // 2 + 1) if count % size == 0)
    for outer in sorted(factors, key=lambda size: size + count // size):
        inner = count // outer
        y, x = probes.integers(0, outer, _PROBES), probes.integers(0, inner, _PROBES)
        error = rows[y * inner + x].astype(np.float64) - rows[y * inner] - rows[x] + rows[0]
        if np.abs(error).max() > _TOLERANCE * scale:
            continue
        first, second = rows[::inner].astype(np.float64), rows[:inner].astype(np.float64) - rows[0]
        slices = (rows[step * inner : (step + 1) * inner] for step in range(outer))
        if any(np.abs(own - first[step] - second).max() > _TOLERANCE * scale for step, own in enumerate(slices)):
            continue
        left = _separated(first) or Table((outer,), (Matrix.of(first),))
        right = _separated(second) or Table((inner,), (Matrix.of(second),))
        return Table((*left.sizes, *right.sizes), left.tables + right.tables)
    return None
