# SPDX-License-Identifier: Apache-2.0
"""Spoken prompts of Debian's asterisk-core-sounds packages, cut into windows of one second and split by prompt.

apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-wav
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.speech.model import BINS, FRAMES, LABELS, RATE, WINDOW
from perceiver_export.runtimes.tasks.sound import Sound, log_mel, read_wav

SOUNDS = Path("/usr/share/asterisk/sounds")
# A folder for each label. One speaker recorded both English and Spanish.
VOICES = ("en_US_f_Allison", "es_MX_f_Allison", "fr_CA_f_June", "it_IT_m_Carlo", "ru_RU_f_IvrvoiceRU")
TONES = ("beep", "beeperr", "ascending-2tone", "descending-2tone", "silence")  # prompts without speech
EMPTY = 44  # bytes of a WAV file without sound: the Russian `is`
QUIET = 0.01  # root mean square; quieter windows hold no speech
TEST, HELD_OUT = 38, 7  # percent of the prompts
HOPS = {"train": WINDOW // 4, "held_out": WINDOW, "test": WINDOW}  # only training windows overlap
STEP = 0.5  # stored spectrograms are rounded to steps of this size, which compress to half the bytes


def prompts(voice: str) -> Iterator[tuple[str, Sound]]:
    """Name and sound of each prompt of a voice."""
    folder = SOUNDS / voice
    for path in sorted(folder.rglob("*.wav")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name.split("/")[0] not in TONES and path.stat().st_size > EMPTY:
            yield name, read_wav(path, RATE)


def part_of(name: str) -> str:
    """train, held_out or test. A prompt and its translations are in the same part."""
    place = zlib.crc32(name.encode()) % 100
    return "test" if place < TEST else "held_out" if place < TEST + HELD_OUT else "train"


def windows(sound: Sound, hop: int) -> Iterator[Sound]:
    """Windows of one second that start every ``hop`` samples, without the quiet ones."""
    for start in range(0, len(sound) - WINDOW + 1, hop):
        window = sound[start : start + WINDOW]
        if np.sqrt(np.mean(window**2)) >= QUIET:
            yield window


def spectrograms(sound: Sound, hop: int) -> list[Sound]:
    """The windows as the bundle prepares them: log-mel spectrograms (FRAMES, BINS)."""
    return [log_mel(window, RATE, FRAMES, BINS) for window in windows(sound, hop)]


def read_parts() -> dict[str, tuple[Sound, np.ndarray]]:
    """Spectrograms (n, FRAMES, BINS) and labels (n,) of each part."""
    if not all((SOUNDS / voice).is_dir() for voice in VOICES):
        raise SystemExit("the prompts are missing: apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-wav")
    found: dict[str, tuple[list[Sound], list[int]]] = {name: ([], []) for name in HOPS}
    for label in range(len(LABELS)):
        for name, sound in prompts(VOICES[label]):
            part = part_of(name)
            heard = spectrograms(sound, HOPS[part])
            found[part][0].extend(heard)
            found[part][1].extend([label] * len(heard))
    return {name: (np.stack(heard), np.array(labels, np.uint8)) for name, (heard, labels) in found.items()}


def stored(heard: Sound, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a data file: rounded spectrograms as the model's input `mel`, and labels."""
    rounded = (np.round(heard / STEP) * STEP).astype(np.float16)
    return {"mel": rounded[..., None], "labels": labels}
