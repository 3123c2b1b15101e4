# SPDX-License-Identifier: Apache-2.0
"""Files of every kind that `run` takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from perceiver_export.runtimes.tasks.sound import write_wav


def write_inputs(folder: Path) -> Path:
    """One file, or directory, of every kind; gives back the folder."""
    generator = np.random.default_rng(0)
    _write_frames(folder / "frames", 20, 30)
    _write_frames(folder / "video", 24, 20)
    write_wav(folder / "sound.wav", (0.2441 * np.sin(np.arange(4800) / 20)).astype(np.float32), 48_000)
    (folder / "text.txt").write_text("good [MASK*4] to you")
    np.savetxt(folder / "cloud.xyz", generator.normal(size=(15, 3)))
    np.savez(folder / "units.npz", entities=generator.normal(size=(9, 16)).astype(np.float32))
    return folder


def _write_frames(folder: Path, height: int, width: int) -> None:
    """Two, in which something moves."""
    folder.mkdir()
    y, x = np.mgrid[:height, :width]
    for index in range(2):
        waves = np.stack([np.sin((x + index) / 5), np.cos(y / 4), np.sin((x + y) / 7)], axis=-1)
        Image.fromarray((127 + 100 * waves).astype(np.uint8)).save(folder / f"frame{index}.png")
