# SPDX-License-Identifier: Apache-2.0
"""Optical flow of frames larger than the model: tiles as DeepMind's notebook cuts them, and one flow put together.

A tile's estimate counts most in its middle. The notebook's grid may name a tile twice (a frame as high as a tile
gives every tile twice, one of 716 rows the lower of two), runs it twice and counts it twice. Here it runs once
and counts twice, which is the same sum. For some sizes (1080 × 1920 is one) the last tile but one of the notebook's
grid reaches beyond the frame, and the notebook fails. Here that tile is left out: the others cover the frame, with
the overlap asked for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError, UsageError

Size = tuple[int, int]  # height, width
Flow = npt.NDArray[np.float32]  # (height, width, 2): pixels right, pixels down


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def shared(self, other: Box) -> Box | None:
        """What both cover, None where they do not meet."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        height = min(self.top + self.height, other.top + other.height) - top
        width = min(self.left + self.width, other.left + other.width) - left
        return Box(top, left, height, width) if height > 0 and width > 0 else None

    def inside(self, outer: Box) -> tuple[slice, slice]:
        """Rows and columns of this box, counted from the corner of one that contains it."""
        top, left = self.top - outer.top, self.left - outer.left
        return slice(top, top + self.height), slice(left, left + self.width)


@dataclass(frozen=True)
class Tile:
    """A rectangle that the model runs on, and how many times the notebook's grid names it."""

    box: Box
    times: int


def grid(frame: Size, tile: Size, min_overlap: int) -> list[tuple[int, int]]:
    """(top, left) of every tile, row by row, in the notebook's order and with its repetitions.

    Raises InputError: a frame smaller than a tile; UsageError: an overlap that is negative or no less than a tile.
    """
    if not 0 <= min_overlap < min(tile):
        raise UsageError(
            f"tiles of {tile[0]} × {tile[1]} cannot overlap by {min_overlap}", f"give 0 to {min(tile) - 1}"
        )
    if frame[0] < tile[0] or frame[1] < tile[1]:
        raise InputError(
            f"the frames have {frame[0]} × {frame[1]} pixels, the model takes {tile[0]} × {tile[1]} or more",
            "scale both frames up, and divide the flow by the same factor",
        )
    rows, columns = (_starts(whole, part, min_overlap) for whole, part in zip(frame, tile, strict=True))
    return [(row, column) for row in rows for column in columns]


def tiles(frame: Size, tile: Size, min_overlap: int) -> list[Tile]:
    """The tiles of `grid` that lie in the frame, each once. Raises what `grid` raises."""
    counted = Counter(grid(frame, tile, min_overlap))
    return [
        Tile(Box(top, left, *tile), times)
        for (top, left), times in counted.items()
        if top + tile[0] <= frame[0] and left + tile[1] <= frame[1]
    ]


def tile_weights(tile: Size) -> npt.NDArray[np.float32]:
    """How much each pixel of a tile counts, (height, width): its distance to the nearest border, from 1 up."""
    rows, columns = (np.minimum(np.arange(size) + 1, size - np.arange(size)) for size in tile)
    return np.minimum.outer(rows, columns).astype(np.float32)


class Stitching:
    """The flow of one region of a frame, put together from its tiles: `add` every one that meets it, then `flow`."""

    def __init__(self, region: Box, tile: Size) -> None:
        self._region = region
        self._weights = tile_weights(tile)[:, :, None]
        self._sum = np.zeros((region.height, region.width, 2), np.float32)
        self._weight = np.zeros((region.height, region.width, 1), np.float32)

    def add(self, tile: Tile, flow: Flow) -> None:
        """Count a tile's flow, given for the part of it that lies in the region (`Box.shared`)."""
        part = self._region.shared(tile.box)
        assert part is not None
        weights = self._weights[part.inside(tile.box)] * np.float32(tile.times)
        target = part.inside(self._region)
        self._sum[target] += flow * weights
        self._weight[target] += weights

    def flow(self) -> Flow:
        """The weighted mean, (height, width, 2)."""
        return self._sum / self._weight


def _starts(whole: int, part: int, min_overlap: int) -> list[int]:
    starts = list(range(0, whole, part - min_overlap))
    starts[-1] = whole - part
    return starts
