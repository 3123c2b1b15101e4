# SPDX-License-Identifier: Apache-2.0
"""Draw clouds of the test data with the answers of a bundle.

    python -m examples.points.picture BUNDLE PICTURE.png

The picture has two clouds of each class, seen from the front and above; near points are dark. A wrong answer is red,
with the label.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.points.data import Array
from examples.points.model import LABELS
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.tasks.points import PointCloudClassification

EACH, COLUMNS, TILE, TEXT = 2, 5, 130, 20  # clouds of a class; tiles in a row; pixels of a tile and of its text
ABOVE = np.radians(25)


def draw(points: Array) -> Image.Image:
    """One cloud, far points first."""
    x, height = points[:, 0], np.cos(ABOVE) * points[:, 2] + np.sin(ABOVE) * points[:, 1]
    depth = np.cos(ABOVE) * points[:, 1] - np.sin(ABOVE) * points[:, 2]
    scale = 0.46 * TILE / max(np.abs(x).max(), np.abs(height).max())
    picture = Image.new("L", (TILE, TILE), 255)
    pen = ImageDraw.Draw(picture)
    for index in np.argsort(-depth):
        left, top = TILE / 2 + scale * x[index], TILE / 2 - scale * height[index]
        pen.ellipse((left - 1.5, top - 1.5, left + 1.5, top + 1.5), round(90 + 60 * float(depth[index])))
    return picture


def main() -> None:
    """Ask the bundle and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    with np.load(Path(__file__).parent / "test.npz") as data:
        points, labels = data["points"].astype(np.float64), data["labels"]
    chosen = [index for label in range(len(LABELS)) for index in np.flatnonzero(labels == label)[:EACH]]
    height = TILE + TEXT
    sheet = Image.new("RGB", (COLUMNS * TILE, -(-len(chosen) // COLUMNS) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    with open_task(arguments.bundle) as classify:
        assert isinstance(classify, PointCloudClassification)
        for place, index in enumerate(chosen):
            answer, label = classify(points[index], top=1)[0].label, LABELS[labels[index]]
            left, top = place % COLUMNS * TILE, place // COLUMNS * height
            sheet.paste(draw(points[index]), (left, top))
            text = answer if answer == label else f"{answer} ({label})"
            pen.text((left + TILE / 2, top + TILE), text, "black" if answer == label else "red", font, "ma")
    sheet.quantize(200).save(arguments.picture, optimize=True)


if __name__ == "__main__":
    main()
