# SPDX-License-Identifier: Apache-2.0
"""The part of the inputs that no call changes: position encodings and padding, axis by axis where they allow it.

An input is x_j = [f_j, p_j]: features (M × C_f) that change with each call beside constants (M × C_p). Fourier features
of a grid are separable: each of their channels depends on one axis alone. So a product with them needs one small table
an axis, not one row an input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perceiver_export.exporter.model.config import FourierPositions
from perceiver_export.exporter.model.inputs import fourier_channels


@dataclass(frozen=True)
class Term:
    """Constant channels that vary along one axis of the grid, along none (None), or freely ("grid").

    ``channels`` are their places among the C_p constants; ``table`` is (size of the axis | 1 | M, len(channels)).
    """

    channels: tuple[int, ...]
    axis: int | str | None
    table: Tensor


@dataclass(frozen=True)
class Constants:
    """The constants of one input: M rows on a grid of ``shape``, as a sum of terms."""

    shape: tuple[int, ...]
    num_channels: int
    terms: tuple[Term, ...]

    @property
    def num_rows(self) -> int:
        """M."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the tables."""
        return self.terms[0].table.dtype if self.terms else torch.get_default_dtype()

    @property
    def num_free_channels(self) -> int:
        """How many channels vary freely over the grid."""
        return sum(len(term.channels) for term in self.terms if term.axis == "grid")

    @property
    def num_axes(self) -> int:
        """Along how many axes some channels vary."""
        return len({term.axis for term in self.terms if isinstance(term.axis, int)})

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean over the channels and sum of their squares, of every row (M,), in float64: without the whole table."""
        total = torch.zeros(1, dtype=torch.float64)
        square = torch.zeros(1, dtype=torch.float64)
        for term in self.terms:
            exact = term.table.double()
            total = total + self._spread(term, exact.sum(1))
            square = square + self._spread(term, (exact**2).sum(1))
        mean = total / max(self.num_channels, 1)
        return mean.expand(self.num_rows), square.expand(self.num_rows)

    def _spread(self, term: Term, values: Tensor) -> Tensor:
        """One number a row of a term's table, for every row of the grid (M or 1,)."""
        if not isinstance(term.axis, int):
            return values
        sizes = [1] * len(self.shape)
        sizes[term.axis] = self.shape[term.axis]
        return values.reshape(sizes).expand(self.shape).flatten()

    def table(self) -> Tensor:
        """All of them, (M, C_p)."""
        table = torch.zeros(self.num_rows, self.num_channels, dtype=self.dtype)
        for term in self.terms:
            table[:, list(term.channels)] = self._rows(term)
        return table

    def _rows(self, term: Term) -> Tensor:
        """A term's table for every row (M, C_t)."""
        if term.axis == "grid":
            return term.table
        if term.axis is None:
            return term.table.expand(self.num_rows, -1)
        assert isinstance(term.axis, int)
        view = [1] * len(self.shape) + [-1]
        view[term.axis] = self.shape[term.axis]
        return term.table.reshape(view).expand(*self.shape, -1).reshape(self.num_rows, -1)


def fourier_constants(config: FourierPositions, shape: tuple[int, ...], table: Tensor) -> Constants:
    """The encoding ``table`` (M, C) of a grid, split by axes; every number is taken from the table."""
    terms = []
    for axis, size in enumerate(shape):
        channels, stride = fourier_channels(config, len(shape), axis), math.prod(shape[axis + 1 :])
        terms.append(Term(tuple(channels), axis, table[: size * stride : stride, channels]))
    return Constants(shape, table.shape[1], tuple(terms))


def free_constants(shape: tuple[int, ...], table: Tensor) -> Constants:
    """Constants (M, C) without structure: a learned table."""
    return Constants(shape, table.shape[1], (Term(tuple(range(table.shape[1])), "grid", table),))


def with_padding(constants: Constants, padding: Tensor) -> Constants:
    """The same constants with a vector (1, P) beside them that is the same for every row."""
    start = constants.num_channels
    term = Term(tuple(range(start, start + padding.shape[1])), None, padding)
    return Constants(constants.shape, start + padding.shape[1], (*constants.terms, term))


def no_constants(shape: tuple[int, ...]) -> Constants:
    """Inputs that are features altogether."""
    return Constants(shape, 0, ())


def scores_of(constants: Constants, weights: Tensor) -> list[tuple[int | str | None, Tensor]]:
    """``weights`` (…, N, C_p) times the constants, term by term: (axis, (…, N, size of the axis | 1 | M))."""
    return [(term.axis, weights[..., list(term.channels)] @ term.table.T) for term in constants.terms]


def add_on_grid(
    scores: Tensor,
    terms: Sequence[tuple[int | str | None, Tensor]],
    shape: tuple[int, ...],
    factor: Tensor,
) -> Tensor:
    """Add each term to scores (…, N, M) along its own axis; the sum times ``factor`` (…, 1, M), which is positive."""
    grid = scores.reshape(*scores.shape[:-1], *shape)
    axes = [axis for axis, _ in terms]
    apart = [axis for axis in axes if isinstance(axis, int)][:-1] if "grid" not in axes else []
    # OpenVINO adds constants of a sum to each other beforehand, small tables of two axes to one of N × M (1.4 GiB for
    # optical flow), unless all but one depend on the input: the sign of what is positive does, and is 1.
    one = torch.sign(factor[..., :1])
    for axis, term in terms:
        if axis in apart:
            term = term * one
        if axis == "grid":
            view = [*term.shape[:-1], *shape]
        else:
            sizes = [1] * len(shape)
            if isinstance(axis, int):
                sizes[axis] = shape[axis]
            view = [*term.shape[:-1], *sizes]
        grid = grid + term.reshape(view)
    # In the shape of the sums: an engine that fuses does all of it in one pass.
    grid = grid * factor.reshape(*factor.shape[:-1], *shape)
    return grid.reshape(scores.shape)


def read_constants(weights: Tensor, constants: Constants) -> Tensor:
    """``weights`` (…, N, M) times the constants (M, C_p) -> (…, N, C_p), by sums over the other axes."""
    grid = weights.reshape(*weights.shape[:-1], *constants.shape)
    pieces: list[Tensor] = []
    order: list[int] = []
    for term in constants.terms:
        if term.axis == "grid":
            piece = weights @ term.table
        elif term.axis is None:
            piece = weights.sum(-1, keepdim=True) * term.table
        else:
            assert isinstance(term.axis, int)
            others = [axis - len(constants.shape) for axis in range(len(constants.shape)) if axis != term.axis]
            piece = (grid.sum(others) if others else grid) @ term.table
        pieces.append(piece)
        order += term.channels
    places = torch.argsort(torch.tensor(order))
    return torch.cat(pieces, dim=-1)[..., places] if order != sorted(order) else torch.cat(pieces, dim=-1)
