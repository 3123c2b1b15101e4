# SPDX-License-Identifier: Apache-2.0
"""Constant rows on a grid, as one small table an axis where they are the sum of such: Fourier positions are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from perceiver_export.exporter.fold.nodes import Shape

_TOLERANCE = 1e-6  # of the largest number; positions come in float32
_PROBES = 48


@dataclass(frozen=True)
class Table:
    """``row[i_0, i_1, …] = sum_a tables[a][i_a]`` over a grid of ``sizes``, in float64; sizes (1,): one row for all."""

    sizes: Shape
    tables: tuple[np.ndarray, ...]

    @classmethod
    def row(cls, row: np.ndarray) -> Table:
        return cls((1,), (row.reshape(1, -1).astype(np.float64),))

    @classmethod
    def of(cls, array: np.ndarray, shape: Shape) -> Table | None:
        """A constant that broadcasts to ``shape``, as rows of its last axes; equal samples count once.

        None where samples differ in axes that broadcast, or a table of all rows is no sum over axes.
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
        rows = array.reshape(-1, shape[-1]).astype(np.float64)
        return cls((1,), (rows,)) if len(rows) == 1 else separated(rows)

    @property
    def rows(self) -> int:
        return math.prod(self.sizes)

    @property
    def is_row(self) -> bool:
        return self.sizes == (1,)

    @property
    def columns(self) -> int:
        return int(self.tables[0].shape[1])

    def __matmul__(self, weight: np.ndarray) -> Table:
        return self._each(lambda table: table @ weight)

    def __mul__(self, factor: np.ndarray | float) -> Table:
        return self._each(lambda table: table * factor)

    def centred(self) -> Table:
        """Each row less its mean."""
        return self._each(lambda table: table - table.mean(1, keepdims=True))

    def placed(self, at: int, width: int) -> Table:
        """As columns ``at`` and following of wider rows."""
        return self._each(lambda table: np.pad(table, ((0, 0), (at, width - at - table.shape[1]))))

    def plus(self, other: Table) -> Table | None:
        """The sum; None where the grids differ."""
        if self.is_row or other.is_row:
            row, grid = (self, other) if self.is_row else (other, self)
            return Table(grid.sizes, (grid.tables[0] + row.tables[0], *grid.tables[1:]))
        if self.sizes != other.sizes:
            return None
        return Table(self.sizes, tuple(one + more for one, more in zip(self.tables, other.tables, strict=True)))

    def only(self, columns: np.ndarray) -> bool:
        """Whether all other columns (a mask) are zero."""
        return not any(np.any(table[:, ~columns]) for table in self.tables)

    def moments(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each row, over some columns (a mask): the mean, and the sum of squared deviations from it."""
        first, *rest = (table[:, columns] for table in self.tables)
        inner = np.zeros((1, first.shape[1]))
        for table in rest:
            inner = (inner[:, None] + table[None]).reshape(-1, first.shape[1])
        means, squares = [], []
        for row in first:  # a slice of the first axis at a time: the whole may be large
            dense = inner + row
            means.append(dense.mean(1))
            squares.append(((dense - means[-1][:, None]) ** 2).sum(1))
        return np.concatenate(means), np.concatenate(squares)

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> Table:
        return Table(self.sizes, tuple(change(table) for table in self.tables))


def separated(rows: np.ndarray) -> Table | None:
    """A table of rows (M, C) as a sum over the axes of a grid: found numerically, checked at every row; None if it is
    no such sum.
    """
    count, scale = len(rows), max(float(np.abs(rows).max()), 1e-30)
    probes = np.random.default_rng(0)
    factors = (size for size in range(2, count // 2 + 1) if count % size == 0)
    for outer in sorted(factors, key=lambda size: size + count // size):
        inner = count // outer
        y, x = probes.integers(0, outer, _PROBES), probes.integers(0, inner, _PROBES)
        error = rows[y * inner + x] - rows[y * inner] - rows[x] + rows[0]
        if np.abs(error).max() > _TOLERANCE * scale:
            continue
        first, second = rows[::inner], rows[:inner] - rows[0]
        slices = (rows[step * inner : (step + 1) * inner] for step in range(outer))
        if any(np.abs(own - first[step] - second).max() > _TOLERANCE * scale for step, own in enumerate(slices)):
            continue
        left = separated(first) or Table((outer,), (first,))
        right = separated(second) or Table((inner,), (second,))
        return Table((*left.sizes, *right.sizes), left.tables + right.tables)
    return None
