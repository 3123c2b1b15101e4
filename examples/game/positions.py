# SPDX-License-Identifier: Apache-2.0
"""Chess positions as sets of pieces, for the model.

    python -m examples.game.positions '7k/6Q1/5K2/8/8/8/8/8 b - - 0 1' -o mate.npz
    perceiver-export run game mate.npz

Each piece is described from the view of the side to move: its kind and owner, its place on the board, and its place
relative to that side's king by file, rank and both diagonals. The order of pieces has no meaning. Absent pieces are
masked.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perceiver_export.runtimes.npz import write_npz
from perceiver_export.runtimes.runtime import Array

MOST = 32
KINDS = "PNBRQKpnbrqk"  # of the side to move first
_FAR = 15  # differences from -7 to 7
SIZES = (len(KINDS), 8, 8, _FAR, _FAR, _FAR, _FAR)
CHANNELS = sum(SIZES)


def pieces(fen: str) -> Array:
    """Kind, file and rank of each piece (n, 3), as the side to move sees the board; for Black it is turned around."""
    placement, turn = fen.split()[:2]
    found = []
    for rank, row in zip(range(7, -1, -1), placement.split("/"), strict=True):
        file = 0
        for sign in row:
            if sign.isdigit():
                file += int(sign)
                continue
            white = turn == "w"
            found.append((KINDS.index(sign if white else sign.swapcase()), file, rank if white else 7 - rank))
            file += 1
    return np.array(found, np.int64)


def mirrored(found: Array) -> Array:
    """The same position with left and right exchanged (…, 3), which changes nothing but castling."""
    return np.stack([found[..., 0], 7 - found[..., 1], found[..., 2]], -1)


def features(found: Array, mask: Array) -> Array:
    """Pieces (…, n, 3) and their mask (…, n) -> (…, n, 88) of zeros and ones, float32."""
    kind, file, rank = np.moveaxis(found, -1, 0)
    king = (kind == KINDS.index("K")) & (mask > 0)
    dx, dy = (one - (one * king).sum(-1, keepdims=True) for one in (file, rank))
    near = [np.clip(one, -7, 7) + 7 for one in (dx, dy, dx - dy, dx + dy)]
    columns = [np.eye(size, dtype=np.float32)[one] for size, one in zip(SIZES, (kind, file, rank, *near), strict=True)]
    joined: Array = np.concatenate(columns, -1) * mask[..., None].astype(np.float32)
    return joined


def padded(positions: Sequence[Array]) -> tuple[Array, Array]:
    """Pieces (positions, 32, 3) and their masks (positions, 32)."""
    found = np.zeros((len(positions), MOST, 3), np.int64)
    mask = np.zeros((len(positions), MOST), np.int32)
    for row, one in enumerate(positions):
        found[row, : len(one)], mask[row, : len(one)] = one, 1
    return found, mask


def inputs(fens: Sequence[str]) -> dict[str, Array]:
    """The model's inputs for positions in FEN, in half precision, because they are zeros and ones."""
    found, mask = padded([pieces(fen) for fen in fens])
    return {"pieces": features(found, mask).astype(np.float16), "pieces_mask": mask}


def main() -> None:
    """Write an .npz of positions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fen", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    write_npz(options.output, inputs(options.fen))


if __name__ == "__main__":
    main()
