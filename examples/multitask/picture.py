# SPDX-License-Identifier: Apache-2.0
"""Draw test pictures with a bundle's answers: `python -m examples.multitask.picture multitask-int8 -o three.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from examples.multitask.data import read
from perceiver_export.runtimes import open_task

SHOWN = 10


def main() -> None:
    """Write the picture: the model's inputs above, its answers below."""
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    given = read("test.npz", SHOWN)["image"]
    with open_task(options.bundle) as task:
        found, labels = task({"image": given}), task.manifest.labels
    figure, axes = pyplot.subplots(2, SHOWN, figsize=(12, 3), layout="constrained")
    for row in range(SHOWN):
        turns = int(found["turn"][row].argmax())
        axes[0, row].imshow(given[row], cmap="gray", vmin=0, vmax=255)
        axes[0, row].set_xlabel(f"turned by {90 * turns}°", fontsize=8)
        axes[1, row].imshow(np.clip(found["upright"][row], 0, 1), cmap="gray", vmin=0, vmax=1)
        axes[1, row].set_xlabel(labels[int(found["label"][row].argmax())], fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(options.output, dpi=90)


if __name__ == "__main__":
    main()
