# SPDX-License-Identifier: Apache-2.0
"""Calibration and test data: the images of examples/fashion_mnist, each turned to the left by some quarters.

Use it as DATA in the repository's folder: `validate … --data examples.multitask.data:test`. It also has metrics for the
two outputs that have no built-in metric: `validate … --metric examples.multitask.data:turn`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from perceiver_export.runtimes.runtime import Array

PICTURES = Path(__file__).parents[1] / "fashion_mnist"
TURNS = 4  # quarters


def calibration() -> Iterator[dict[str, Array]]:
    """512 images that were held out of training."""
    return _samples("held_out.npz", 512)


def test() -> Iterator[dict[str, Array]]:
    """The 10,000 official test images."""
    return _samples("test.npz", 10_000)


def turned(images: Array, quarters: Array) -> Array:
    """Pictures (n, 28, 28), each turned to the left by its number of quarters."""
    found = np.empty_like(images)
    for turn in range(TURNS):
        found[quarters == turn] = np.rot90(images[quarters == turn], turn, (1, 2))
    return found


def read(name: str, count: int) -> dict[str, Array]:
    """The first images of an archive, turned at random with a fixed seed, and the right answers."""
    with np.load(PICTURES / name) as archive:
        images, labels = archive["image"][:count], archive["labels"][:count]
    quarters = np.random.default_rng(0).integers(TURNS, size=len(images))
    return {"image": turned(images, quarters), "labels": labels, "quarters": quarters, "picture": images}


def _samples(name: str, count: int) -> Iterator[dict[str, Array]]:
    arrays = read(name, count)
    for row in range(len(arrays["image"])):
        yield {name: array[row] for name, array in arrays.items()}


def turn(outputs: dict[str, Array], targets: dict[str, Array]) -> float:
    """1 if the turn is right, else 0."""
    return float(outputs["turn"].argmax() == targets["quarters"])


turn.unit = "%"  # type: ignore[attr-defined]


def upright(outputs: dict[str, Array], targets: dict[str, Array]) -> float:
    """The mean error of a pixel of the upright image, in gray levels from 0 to 255."""
    return float(np.abs(255 * np.clip(outputs["upright"], 0, 1) - targets["picture"]).mean())


upright.better = "lower"  # type: ignore[attr-defined]
upright.unit = "grey levels"  # type: ignore[attr-defined]
