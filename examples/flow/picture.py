# SPDX-License-Identifier: Apache-2.0
"""Draw a bundle's flow of a real video and of Middlebury's motorcycle, and print its error on the motorcycle.

python -m examples.flow.picture flow -o flow.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from examples.flow.data import HERE, Floats, motorcycle
from examples.flow.train import classical
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.tasks.flow_files import flow_image

FRAMES = HERE / "frames"


def error(found: Floats, truth: Floats) -> float:
    """The mean end-point error at known pixels."""
    return float(np.nanmean(np.linalg.norm(found - truth, axis=-1)))


def main() -> None:
    """Write the picture and print the errors as JSON."""
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    pair, truth = motorcycle()
    before, after = sorted(FRAMES.iterdir())
    with open_task(options.bundle) as flow:
        walking, riding = flow(before, after), flow(*pair)
    others = classical(pair)
    name = min(others, key=lambda one: error(others[one], truth))
    walkers = np.stack([np.asarray(Image.open(file)) for file in (before, after)])
    found = {"Perceiver": riding, **others, "nothing moves": np.zeros_like(truth)}
    print(json.dumps({one: round(error(flow, truth), 3) for one, flow in found.items()}))
    shown = {
        "frame of vtest.avi": walkers[0],
        "difference to the next": np.abs(walkers[0].astype(int) - walkers[1]).astype(np.uint8),
        "flow": flow_image(walking, 3),
        "flow, Lucas-Kanade": flow_image(classical(walkers)[list(others)[1]], 3),
        "motorcycle": pair[0],
        "true flow": flow_image(truth, 3),
        f"flow, error {error(riding, truth):.2f} px": flow_image(riding, 3),
        f"{name.split(' (')[0]}, {error(others[name], truth):.2f} px": flow_image(others[name], 3),
    }
    figure, axes = pyplot.subplots(2, 4, figsize=(11, 5), layout="constrained")
    for axis, (title, picture) in zip(axes.flat, shown.items(), strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[])
    figure.savefig(options.output, dpi=58)


if __name__ == "__main__":
    main()
