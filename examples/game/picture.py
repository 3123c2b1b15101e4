# SPDX-License-Identifier: Apache-2.0
"""Draw test positions with the bundle's answers: `python -m examples.game.picture game-int8 -o boards.png`.

As for the model, the side to move is at the bottom of the board, and its pieces are white.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from examples.game.positions import SIZES
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks.base import answer

HERE = Path(__file__).parent
SIGNS = "♟♞♝♜♛♚"


def draw(axes: Any, pieces: Array, said: str) -> None:
    """A board with its pieces, given as the model's input (32, 88), and the answer below."""
    axes.imshow(np.add.outer(range(8), range(8)) % 2, cmap="copper", vmin=-2, vmax=2, origin="lower")
    ends = np.cumsum(SIZES)[:2]
    for row in pieces[pieces.any(1)]:
        kind, file, rank = (int(part.argmax()) for part in np.split(row, [*ends, ends[1] + 8])[:3])
        own = kind < len(SIGNS)
        color, edge = ("white", "black") if own else ("black", "white")
        sign = axes.text(file, rank, SIGNS[kind % len(SIGNS)], ha="center", va="center", fontsize=15, color=color)
        sign.set_path_effects([outline(edge)])
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(said, fontsize=9)


def outline(color: str) -> Any:
    """A thin outline around a sign."""
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=1, foreground=color)


def main() -> None:
    """Write the picture."""
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="the first of six test positions")
    options = parser.parse_args()
    with np.load(HERE / "test.npz") as data:
        chosen = {name: data[name][options.first : options.first + 6] for name in data.files}
    with open_task(options.bundle) as task:
        scores = task({name: chosen[name] for name in ("pieces", "pieces_mask")})["scores"]
        said = [answer(row, "single-label", task.manifest.labels, 1)[0] for row in scores]
        names = task.manifest.labels
    figure, axes = pyplot.subplots(1, 6, figsize=(12, 2.5), layout="constrained")
    for axis, pieces, one, true in zip(axes, chosen["pieces"], said, chosen["labels"], strict=True):
        draw(axis, pieces, f"{one.label}  {one.probability:.0%}\n(truth: {names[true]})")
    figure.savefig(options.output, dpi=90)


if __name__ == "__main__":
    main()
