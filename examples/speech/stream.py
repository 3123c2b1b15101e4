# SPDX-License-Identifier: Apache-2.0
"""Answers along recordings: a window of one second moves in steps of a quarter of a second.

    python -m examples.speech.stream BUNDLE SOUND.wav… [--picture PICTURE.png]

Several recordings are joined. The picture shows the spectrogram, and below it the answer at the middle of each window.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.tasks.base import Prediction
from perceiver_export.runtimes.tasks.sound import AudioClassification, Sound, log_mel, read_wav

QUIET = 0.01  # root mean square; quieter windows hold no speech
STEPS = 4  # windows a second
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#111111")
WIDTH, HEIGHT, BAND = 75, 8, 44  # pixels of a second, of a mel bin, and of the answers
BINS, FRAMES = 32, 25  # of the picture's spectrogram; frames per second


def answers(classify: AudioClassification, sound: Sound) -> Iterator[tuple[float, Prediction | None]]:
    """The start of each window in seconds, and its most probable label; None where it is quiet."""
    length, rate = classify.preprocessing.num_samples, classify.preprocessing.sample_rate
    for start in range(0, len(sound) - length + 1, rate // STEPS):
        window = sound[start : start + length]
        loud = float(np.sqrt(np.mean(window**2))) >= QUIET
        yield start / rate, classify(window, top=1)[0] if loud else None


def draw(sound: Sound, rate: int, found: list[tuple[float, Prediction | None]], lines: list[float]) -> Image.Image:
    """The spectrogram, lines at the ends of the recordings, and a colored band of answers."""
    seconds = len(sound) / rate
    heard = log_mel(sound, rate, round(seconds * FRAMES), BINS).T[::-1]
    shade = np.clip((heard + 8) / 18, 0, 1)[..., None]
    colours = np.uint8(255 * np.concatenate([1 - shade, 1 - 0.8 * shade, 1 - 0.5 * shade], 2))
    size = (round(WIDTH * seconds), HEIGHT * BINS)
    picture = Image.new("RGB", (size[0], size[1] + BAND), "white")
    picture.paste(Image.fromarray(colours).resize(size, Image.Resampling.BILINEAR))
    pen, font, shown, free = ImageDraw.Draw(picture), ImageFont.load_default(14), "", 0.0
    for line in lines:
        pen.line([(WIDTH * line, 0), (WIDTH * line, size[1])], "black")
    for start, answer in found:
        left = WIDTH * (start + 0.5 - 0.5 / STEPS)  # the band is at the middle of the window
        if answer is not None:
            box = (left, size[1] + 4, left + WIDTH / STEPS - 1, size[1] + 20)
            pen.rectangle(box, COLOURS[answer.index % len(COLOURS)])
            if answer.label != shown and left >= free:
                pen.text((left, size[1] + 22), answer.label, "black", font)
                free, shown = left + pen.textlength(answer.label, font), answer.label
    return picture.quantize(80)


def main() -> None:
    """Print the answers and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("sounds", nargs="+", metavar="SOUND.wav")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    with open_task(arguments.bundle) as classify:
        assert isinstance(classify, AudioClassification)
        rate = classify.preprocessing.sample_rate
        recordings = [read_wav(file, rate) for file in arguments.sounds]
        sound = np.concatenate(recordings)
        found = list(answers(classify, sound))
    for start, answer in found:
        print(f"{start:6.2f} s  " + (f"{answer.label:10s} {answer.probability:.0%}" if answer else "quiet"))
    if arguments.picture:
        ends = np.cumsum([len(one) for one in recordings])[:-1] / rate
        draw(sound, rate, found, ends.tolist()).save(arguments.picture, optimize=True)


if __name__ == "__main__":
    main()
