# SPDX-License-Identifier: Apache-2.0
"""Draw test pieces and a bundle's reconstructions of them, and write both sounds.

python -m examples.video.picture video -o video.png --sounds sounds
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from examples.video.data import HERE, LABELS, RATE
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.tasks.sound import write_wav
from perceiver_export.runtimes.tasks.video import psnr

SHOWN = (0, 2, 5, 7)  # frames of 8


def main() -> None:
    """Write the picture and the sounds."""
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sounds", type=Path, help="a folder for the sounds")
    options = parser.parse_args()
    with np.load(HERE / "test.npz") as test:
        frames, audio = (test[name][: len(LABELS)].astype(np.float32) for name in ("frames", "audio"))
    with open_task(options.bundle) as task:
        found = [task.reconstruct({"frames": frames[i][None], "audio": audio[i][None]}) for i in range(len(LABELS))]
    figure, axes = pyplot.subplots(2 * len(LABELS), len(SHOWN) + 1, figsize=(9, 10), layout="constrained")
    for index, answer in enumerate(found):
        pairs = ((frames[index], audio[index, :, 0]), (answer.video, answer.sound))
        for row, (video, sound) in enumerate(pairs, 2 * index):
            for column, number in enumerate(SHOWN):
                axes[row, column].imshow(video[number], vmin=0, vmax=1)
            axes[row, -1].plot(sound, linewidth=0.5)
            axes[row, -1].set_ylim(-1.1 * np.abs(pairs[0][1]).max(), 1.1 * np.abs(pairs[0][1]).max())
            if options.sounds is not None:
                options.sounds.mkdir(parents=True, exist_ok=True)
                write_wav(options.sounds / f"{LABELS[index]}-{('given', 'found')[row % 2]}.wav", sound, RATE)
        best = answer.labels[0]
        axes[2 * index, 0].set_ylabel(LABELS[index], fontsize=9)
        said = f"{best.label} {100 * best.probability:.0f} %\n{psnr(frames[index], answer.video):.1f} dB"
        axes[2 * index + 1, 0].set_ylabel(said, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(options.output, dpi=45)


if __name__ == "__main__":
    main()
