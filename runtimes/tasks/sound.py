# SPDX-License-Identifier: Apache-2.0
"""Audio classification, WAV files and log-mel spectrograms.

Some models also take video. WAV files are read as PCM of 8, 16, 24 or 32 bits or as floats, and written as 16 bits. The
standard library's `wave` does not read floats or, before Python 3.12, the extensible header that most tools write for
24 bits, so this module parses the file itself.
"""

from __future__ import annotations

import os
import shlex
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.files import reading
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.preprocessing import AudioPreprocessing
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks import base
from perceiver_export.runtimes.tasks.base import Classifier, LoadPart, Prediction, Shape
from perceiver_export.runtimes.tasks.image_files import Color, as_array
from perceiver_export.runtimes.tasks.images import FramesLike, load_npy, prepare_frames, read_frames

Sound = npt.NDArray[np.float32]
AudioLike = str | os.PathLike[str] | npt.NDArray[Any]

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_ENCODINGS = {*((_PCM, bits) for bits in (8, 16, 24, 32)), (_FLOAT, 32), (_FLOAT, 64)}
# Recorders that cannot seek back leave a size of 0 or close to the largest: ffmpeg 0xFFFFFFFF, arecord 0x80000000, SoX
# 0x7FFFFFFF less its header.
_ENDLESS = 0x7FFF0000
# Lossy formats decode to slightly more than 1. Far larger values mean that the sound is not in [-1, 1].
_LOUDEST = 2.0
_FORMAT = 40  # bytes of the longest format chunk; the rest of a longer one is skipped


class _Format(NamedTuple):
    tag: int
    channels: int
    rate: int
    size: int  # bytes of a sample


def take_sound(audio: AudioLike, sample_rate: int | None, num_samples: int) -> Sound:
    """The first ``num_samples`` of a WAV file or an array, float32 (num_samples,) in [-1, 1].

    ``sample_rate`` is the model's, in Hz. If it is unknown (None), a file of any rate is used unchanged.

    An array is (samples,) or (samples, channels) at the model's rate: floating point in [-1, 1], or int16. Only the
    first channel is used, as in DeepMind's code.

    Raises InputError: sound that is too short, and what `read_wav` and `as_sound` raise.
    """
    if isinstance(audio, (str, os.PathLike)):
        sound, name = read_wav(audio, sample_rate, num_samples), os.fspath(audio)
    else:
        sound, name = as_sound(audio), "the sound"
    if len(sound) < num_samples:
        found, needed = (
            f"{samples} samples" + (f", {samples / sample_rate:.3f} s at {sample_rate} Hz" if sample_rate else "")
            for samples in (len(sound), num_samples)
        )
        raise InputError(f"{name} has only {found}, but the model needs {needed}", "give a longer recording")
    return sound[:num_samples]


def as_sound(sound: npt.ArrayLike) -> Sound:
    """Sound (samples,) or (samples, channels), floating point or int16, as float32 (samples,). Raises InputError."""
    array = as_array(sound)
    if array.ndim not in (1, 2) or 0 in array.shape:
        raise InputError(f"the sound has shape {list(array.shape)}", "give (samples,) or (samples, channels)")
    first = array if array.ndim == 1 else array[:, 0]
    if array.dtype == np.int16:
        return first.astype(np.float32) / np.float32(1 << 15)
    if array.dtype.kind != "f":
        raise InputError(f"the sound has dtype {array.dtype}", "give floating point in [-1, 1], or int16")
    return _checked(first, "the sound")


def read_wav(path: str | os.PathLike[str], sample_rate: int | None, most: int | None = None) -> Sound:
    """The first channel of a WAV file, float32 (samples,) in [-1, 1], limited to ``most`` samples if that is given.

    ``sample_rate`` (Hz) is the required rate; None accepts any. n-bit PCM is divided by 2^(n−1), as in DeepMind's code
    for 16 bits.

    Raises InputError: missing, not a WAV file, another rate, an unsupported encoding, empty or truncated.
    """
    name = os.fspath(path)
    with reading(name, hint="give a WAV file"), open(path, "rb") as file:
        form, size = _find_data(file, name, sample_rate)
        left = os.fstat(file.fileno()).st_size - file.tell()
        if size > left:
            raise InputError(f"{name} is truncated: it contains {left} of {size} bytes of sound", "copy it again")
        frame = form.channels * form.size
        content = file.read(min(size // frame, size if most is None else most) * frame)
    if not content:
        raise InputError(f"{name} contains no sound", "give a recording that is not empty")
    return _checked(_first_channel(content, form), name)


def write_wav(path: str | os.PathLike[str], sound: npt.NDArray[np.floating], sample_rate: int) -> None:
    """Write sound (samples,) in [-1, 1] as mono 16-bit WAV; other values are clipped. Raises OSError."""
    import wave

    samples = np.clip(np.round(sound.astype(np.float64) * (1 << 15)), -(1 << 15), (1 << 15) - 1)
    # `wave.open` accepts a path only as str.
    with wave.open(os.fspath(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.astype("<i2").tobytes())


def wav_rate(path: str | os.PathLike[str]) -> int:
    """The file's sample rate in Hz. Raises InputError: not a WAV file; OSError."""
    with open(path, "rb") as file:
        return _find_data(file, os.fspath(path), None)[0].rate


def conversion(path: str | os.PathLike[str], sample_rate: int | None) -> str:
    """The command that converts any recording to a WAV file of the right rate.

    It keeps the channels, because `-ac 1` would mix them and DeepMind's code uses the first.
    """
    rate = f" -ar {sample_rate}" if sample_rate is not None else ""
    return f"ffmpeg -i {shlex.quote(os.fspath(path))}{rate} out.wav"


def _find_data(file: BinaryIO, name: str, sample_rate: int | None) -> tuple[_Format, int]:
    """Move ``file`` to the first sample. Returns the format and the sound's size in bytes."""
    hint, end = conversion(name, sample_rate), os.fstat(file.fileno()).st_size
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise InputError(f"{name} is {'not a WAV file' if head else 'empty'}", hint)
    form, whole = None, int.from_bytes(head[4:8], "little")
    while len(head := file.read(8)) == 8:
        kind, size = struct.unpack("<4sI", head)
        start = file.tell()
        if kind == b"fmt ":
            form = _format(file.read(min(size, _FORMAT)), name, hint)
            if sample_rate not in (None, form.rate):
                raise InputError(f"{name} has {form.rate} samples per second, but the model takes {sample_rate}", hint)
        elif kind == b"data":
            if form is None:
                raise InputError(f"{name} has its sound before its format", hint)
            # A size of 0 is real if the RIFF header's size includes more chunks after it.
            unknown = size > max(end - start, _ENDLESS) or (size == 0 and not start < 8 + whole < _ENDLESS)
            return form, end - start if unknown else size
        file.seek(start + size + size % 2)
    raise InputError(f"{name} is truncated: it ends before its sound", "copy it again")


def _format(content: bytes, name: str, hint: str) -> _Format:
    if len(content) < 16:
        raise InputError(f"{name} is truncated in its header", "copy it again")
    tag, channels, rate, _, frame_size, bits = struct.unpack("<HHIIHH", content[:16])
    if tag == _EXTENSIBLE and len(content) >= 26:
        (tag,) = struct.unpack("<H", content[24:26])  # the sub-format's GUID starts with the classic tag
    if (tag, bits) not in _ENCODINGS or not channels or frame_size != channels * bits // 8:
        raise InputError(f"{name} has an unsupported encoding (format {tag}, {bits} bits)", hint)
    return _Format(tag, channels, rate, bits // 8)


def _first_channel(content: bytes, form: _Format) -> npt.NDArray[np.floating]:
    samples = np.frombuffer(content, np.uint8).reshape(-1, form.channels, form.size)[:, 0]
    if form.tag == _FLOAT:
        return np.ascontiguousarray(samples).view(f"<f{form.size}")[:, 0]
    if form.size == 1:  # the only unsigned width
        samples = samples ^ np.uint8(0x80)
    # In the upper bytes of a 32-bit integer, samples of every width have the right sign and scale.
    padded = np.zeros((len(samples), 4), np.uint8)
    padded[:, 4 - form.size :] = samples
    return padded.view("<i4")[:, 0].astype(np.float32) / np.float32(1 << 31)


def _checked(sound: npt.NDArray[np.floating], name: str) -> Sound:
    if not np.isfinite(sound).all():
        raise InputError(f"{name} contains NaN or infinity", "repair the recording")
    loudest = float(np.abs(sound).max())
    if loudest > _LOUDEST:
        raise InputError(f"{name} has values up to {loudest:g}", "scale it to [-1, 1]")
    return np.ascontiguousarray(sound, dtype=np.float32)


WINDOW_SECONDS = 0.025
FLOOR = 1e-10  # lower limit of the energy before its logarithm: silence is log(1e-10) ≈ −23


def log_mel(sound: npt.NDArray[np.float32], sample_rate: int, frames: int, bins: int) -> npt.NDArray[np.float32]:
    """A log-mel spectrogram, float32 (frames, bins), of sound (samples,) in [-1, 1].

    The Perceiver papers do not publish the parameters of their mel spectrograms. These are common ones. For a model
    trained with others, pass its own spectrogram as an array.

    - Frame i is centered at sample (i + ½)·samples/frames, so the frames cover the sound evenly. Zeros surround it.
    - The window is a Hann window of 25 ms, or of two and a half hops if that is longer; the spectrum is |FFT|². The
      FFT is padded to the power of two at which even the narrowest band contains a frequency.
    - The filters are ``bins`` triangles with peak 1, whose corners are evenly spaced from 0 to half the sample rate on
      HTK's mel scale, 2595·log10(1 + f/700).
    - The result is the natural logarithm of the energy, which is at least 1e-10.

    Raises InputError: fewer samples than frames.
    """
    samples = len(sound)
    if samples < frames:
        raise InputError(f"{samples} samples are too few for {frames} frames", "give a longer recording")
    width = int(np.ceil(max(WINDOW_SECONDS * sample_rate, 2.5 * samples / frames)))
    filters = _mel_filters(sample_rate, width, bins)
    size = 2 * (len(filters) - 1)
    starts = np.floor((np.arange(frames) + 0.5) * samples / frames).astype(np.int64) - width // 2 + width
    padded = np.pad(sound.astype(np.float64), width)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
    energies = np.empty((frames, bins))
    for i, start in enumerate(starts):  # one at a time, because all frames at once would take several times the memory
        spectrum = np.fft.rfft(padded[start : start + width] * window, size)
        energies[i] = (spectrum.real**2 + spectrum.imag**2) @ filters
    return np.log(np.maximum(energies, FLOOR)).astype(np.float32)


def mel_corners(sample_rate: int, bins: int) -> npt.NDArray[np.float64]:
    """Corners of the triangles in Hz, (bins + 2,): triangle i rises from corner i, peaks at i + 1 and ends at i + 2."""
    highest = 2595 * np.log10(1 + sample_rate / 2 / 700)
    return np.asarray(700 * (10 ** (np.linspace(0, highest, bins + 2) / 2595) - 1))


@lru_cache(maxsize=4)
def _mel_filters(sample_rate: int, width: int, bins: int) -> npt.NDArray[np.float64]:
    """The weight of each FFT frequency in each triangle, (frequencies, bins)."""
    corners = mel_corners(sample_rate, bins)
    narrowest = float(corners[1] - corners[0])
    size = 1 << int(np.ceil(np.log2(max(width, sample_rate / narrowest))))
    frequencies = np.arange(size // 2 + 1)[:, None] * (sample_rate / size)
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequencies - low) / (peak - low), (high - frequencies) / (high - peak)
    return np.maximum(np.minimum(rising, falling), 0.0)


class AudioClassification(Classifier):
    """``classify(audio)``, or ``classify(audio, frames)``, -> the most probable labels, or the values of a
    regression model.

    Several of AudioSet's labels may apply at once: each probability is the sigmoid of its own logit, and they do not
    sum to 1. If the manifest says single-label, probabilities are the softmax. Sound is a WAV file or an array (see
    `take_sound`). For a model of mel spectrograms, a .npy file or an array of the model's shape (frames, bins) is the
    log-mel spectrogram itself; for sound, `log_mel` computes it with parameters that may differ from those in training.
    Input longer than the model's is cut off at its length. Frames are as in `read_frames`. Arrays are RGB; with
    ``color="bgr"`` they are BGR, as OpenCV reads them.
    """

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        self.preprocessing = base.steps_of(manifest, AudioPreprocessing)

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a classifier of sound, video or both."""
        inputs = _inputs(base.steps_of(manifest, AudioPreprocessing))
        if not inputs:
            raise base.misfit("the manifest has neither sound nor frames")
        base.check_interface(manifest, inputs, {base.answering(manifest)[0]: (None,)})

    @property
    def hears(self) -> bool:
        """Whether the model takes sound, as samples or as a spectrogram."""
        return bool(self.preprocessing.num_samples or self.preprocessing.mel)

    @property
    def sees(self) -> bool:
        """Whether the model takes frames."""
        return self.preprocessing.num_frames > 0

    def __call__(
        self, audio: AudioLike | None = None, frames: FramesLike | None = None, top: int = 5, color: Color = "rgb"
    ) -> list[Prediction]:
        """The ``top`` labels, most probable first, or all values.

        Raises InputError: wrong, missing or superfluous sound or frames; UsageError: top below 1.
        """
        base.check_top(top)
        return self.answers(self.run_inputs(self.preprocess(audio, frames, color))[0], top)

    def preprocess(
        self, audio: AudioLike | None = None, frames: FramesLike | None = None, color: Color = "rgb"
    ) -> dict[str, Array]:
        """The model's inputs for one sample, of ``audio`` (1, samples, 1), ``mel`` (1, frames, bins, 1) and ``frames``
        (1, T, H, W, 3).
        """
        steps, feeds = self.preprocessing, dict[str, Array]()
        for name, given, wanted in (("sound", audio, self.hears), ("frames", frames, self.sees)):
            if (given is not None) != wanted:
                verb, hint = ("needs", f"give {name} as well") if wanted else ("takes no", f"omit the {name}")
                raise InputError(f"the model {verb} {name}", hint)
        if audio is not None and steps.mel:
            feeds["mel"] = self._spectrogram(audio, steps.mel)[None, ..., None]
        elif audio is not None:
            feeds["audio"] = take_sound(audio, steps.sample_rate, steps.num_samples)[None, ..., None]
        if frames is not None:
            images = read_frames(frames, steps.num_frames, color)
            feeds["frames"] = prepare_frames(images, steps.height, steps.width)[None]
        return feeds

    def _spectrogram(self, audio: AudioLike, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        """``audio`` itself if it has the shape of the model's spectrogram, else the spectrogram of the sound."""
        from_file = not isinstance(audio, np.ndarray) and Path(audio).suffix.lower() == ".npy"
        given = load_npy(audio) if from_file else audio  # type: ignore[arg-type]
        if isinstance(given, np.ndarray) and given.shape in (shape, (*shape, 1)):
            if given.dtype.kind != "f" or not np.isfinite(given).all():
                raise InputError(f"the spectrogram is {given.dtype}, or has NaN or infinity", "give finite floats")
            return given.reshape(shape).astype(np.float32)
        steps = self.preprocessing
        if not steps.num_samples or from_file:
            found = f"an array of shape {list(given.shape)}" if isinstance(given, np.ndarray) else "a sound file"
            raise InputError(f"the input is {found}", f"give a log-mel spectrogram {shape}")
        return log_mel(take_sound(given, steps.sample_rate, steps.num_samples), steps.sample_rate, *shape)


def _inputs(steps: AudioPreprocessing) -> dict[str, Shape]:
    inputs: dict[str, Shape] = {}
    if steps.mel:
        inputs["mel"] = (*steps.mel, 1)
    elif steps.num_samples:
        inputs["audio"] = (steps.num_samples, 1)
    if steps.num_frames:
        inputs["frames"] = (steps.num_frames, steps.height, steps.width, 3)
    return inputs
