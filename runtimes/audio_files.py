# SPDX-License-Identifier: Apache-2.0
"""WAV files in numpy: PCM of 8, 16, 24 or 32 bits and floating point in, 16 bits out.

The standard library's `wave` refuses floating point, and before Python 3.12 the extensible header that most tools
write for 24 bits; so the few chunks of a file are read here.
"""

from __future__ import annotations

import os
import shlex
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.frame_files import as_array

Sound = npt.NDArray[np.float32]
AudioLike = str | os.PathLike[str] | npt.NDArray[Any]

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_UNKNOWN_SIZE = 0xFFFFFFFF  # what ffmpeg writes when it cannot seek back
# Lossy formats decode to a little more than 1; anything far above it is not in [-1, 1] at all.
_LOUDEST = 2.0


@dataclass(frozen=True)
class _Format:
    tag: int
    channels: int
    rate: int
    bits: int

    @property
    def frame_size(self) -> int:
        return self.channels * self.bits // 8


def take_sound(audio: AudioLike, sample_rate: int, num_samples: int) -> Sound:
    """The first ``num_samples`` of a WAV file or an array, float32 (num_samples,) in [-1, 1].

    An array is (samples,) or (samples, channels) at the model's rate: floating point in [-1, 1], or int16. Of several
    channels the first is taken, as DeepMind does.

    Raises InputError: what `read_wav` and `as_sound` refuse, and sound that is too short.
    """
    if isinstance(audio, (str, os.PathLike)):
        sound, name = read_wav(audio, sample_rate, num_samples), os.fspath(audio)
    else:
        sound, name = as_sound(audio), "the sound"
    if len(sound) < num_samples:
        raise InputError(
            f"{name} lasts {len(sound) / sample_rate:.3f} s, {len(sound)} samples",
            f"the model needs {num_samples / sample_rate:.3f} s, {num_samples} samples at {sample_rate} Hz",
        )
    return sound[:num_samples]


def as_sound(sound: npt.ArrayLike) -> Sound:
    """float32 (samples,) of numbers (samples,) or (samples, channels), floating point or int16. Raises InputError."""
    array = as_array(sound)
    if array.ndim not in (1, 2) or 0 in array.shape:
        raise InputError(f"the sound has shape {list(array.shape)}", "give (samples,) or (samples, channels)")
    first = array if array.ndim == 1 else array[:, 0]
    if array.dtype == np.int16:
        return first.astype(np.float32) / np.float32(1 << 15)
    if array.dtype.kind != "f":
        raise InputError(f"the sound has dtype {array.dtype}", "give floating point in [-1, 1], or int16")
    return _checked(first, "the sound")


def read_wav(path: str | os.PathLike[str], sample_rate: int, most: int | None = None) -> Sound:
    """The first channel of a WAV file, float32 (samples,) in [-1, 1]; ``most`` samples of it where that is given.

    n-bit PCM is divided by 2^(n−1), as DeepMind's code does for 16 bits.

    Raises InputError: not there, not a WAV file, of another rate or encoding, empty or cut short.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            form, size = _find_data(file, name, sample_rate)
            left = os.fstat(file.fileno()).st_size - file.tell()
            if size == _UNKNOWN_SIZE:
                size = left
            if size > left:
                raise InputError(f"{name} is cut short: {left} of {size} bytes of sound are there", "copy it again")
            frames = size // form.frame_size
            wanted = frames if most is None else min(frames, most)
            content = file.read(wanted * form.frame_size)
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist", "check the path") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}", "give a WAV file") from error
    if not content:
        raise InputError(f"{name} holds no sound", "give a recording that is not empty")
    return _checked(_first_channel(content, form), name)


def write_wav(path: str | os.PathLike[str], sound: npt.NDArray[np.floating], sample_rate: int) -> None:
    """Write sound (samples,) in [-1, 1] as mono 16-bit WAV; what lies outside is clipped. Raises OSError."""
    import wave

    samples = np.clip(np.round(sound.astype(np.float64) * (1 << 15)), -(1 << 15), (1 << 15) - 1)
    # `wave.open` takes a path as text only.
    with wave.open(os.fspath(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.astype("<i2").tobytes())


def conversion(path: str | os.PathLike[str], sample_rate: int) -> str:
    """The command that makes a WAV file of the right rate of any recording.

    It keeps the channels: `-ac 1` would mix them, and DeepMind's code takes the first.
    """
    return f"ffmpeg -i {shlex.quote(os.fspath(path))} -ar {sample_rate} out.wav"


def _find_data(file: BinaryIO, name: str, sample_rate: int) -> tuple[_Format, int]:
    """Leave ``file`` where the samples begin; their format and size in bytes."""
    hint = conversion(name, sample_rate)
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise InputError(f"{name} is {'not a WAV file' if head else 'empty'}", hint)
    form = None
    while len(head := file.read(8)) == 8:
        kind, size = struct.unpack("<4sI", head)
        if kind == b"data":
            if form is None:
                raise InputError(f"{name} has sound before its format", hint)
            return form, size
        if kind == b"fmt ":
            form = _format(file.read(size + size % 2), name, hint)
            if form.rate != sample_rate:
                raise InputError(f"{name} has {form.rate} samples a second, the model takes {sample_rate}", hint)
        else:
            file.seek(size + size % 2, os.SEEK_CUR)
    raise InputError(f"{name} is cut short: it ends before its sound", "copy it again")


def _format(content: bytes, name: str, hint: str) -> _Format:
    if len(content) < 16:
        raise InputError(f"{name} is cut short in its header", "copy it again")
    tag, channels, rate, _, frame_size, bits = struct.unpack("<HHIIHH", content[:16])
    if tag == _EXTENSIBLE and len(content) >= 26:
        (tag,) = struct.unpack("<H", content[24:26])  # the first bytes of the sub-format's GUID are the old tag
    form = _Format(tag, channels, rate, bits)
    known = (tag == _PCM and bits in (8, 16, 24, 32)) or (tag == _FLOAT and bits in (32, 64))
    if not known or not channels or form.frame_size != frame_size:
        raise InputError(f"{name} has an encoding that is not read here (format {tag}, {bits} bits)", hint)
    return form


def _first_channel(content: bytes, form: _Format) -> npt.NDArray[np.floating]:
    if form.tag == _FLOAT:
        return np.frombuffer(content, f"<f{form.bits // 8}")[:: form.channels]
    if form.bits == 8:  # the only one without a sign
        return (np.frombuffer(content, np.uint8)[:: form.channels].astype(np.float32) - 128) / 128
    if form.bits == 24:
        triples = np.frombuffer(content, np.uint8).reshape(-1, form.channels, 3)[:, 0]
        # As the upper three bytes of 32 bits the sign comes out right, and so does the scale.
        padded = np.concatenate([np.zeros_like(triples[:, :1]), triples], axis=1)
        return padded.view("<i4")[:, 0].astype(np.float32) / np.float32(1 << 31)
    samples = np.frombuffer(content, f"<i{form.bits // 8}")[:: form.channels]
    return samples.astype(np.float32) / np.float32(1 << (form.bits - 1))


def _checked(sound: npt.NDArray[np.floating], name: str) -> Sound:
    if not np.isfinite(sound).all():
        raise InputError(f"{name} holds values that are not finite numbers", "repair the recording")
    loudest = float(np.abs(sound).max())
    if loudest > _LOUDEST:
        raise InputError(f"{name} reaches {loudest:g}", "scale it to [-1, 1]")
    return np.ascontiguousarray(sound, dtype=np.float32)
