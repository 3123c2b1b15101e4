# SPDX-License-Identifier: Apache-2.0
"""Log-mel spectrograms in numpy."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError

WINDOW_SECONDS = 0.025
FLOOR = 1e-10  # of the energy, before its logarithm: silence is log(1e-10) ≈ −23


def log_mel(sound: npt.NDArray[np.float32], sample_rate: int, frames: int, bins: int) -> npt.NDArray[np.float32]:
    """A log-mel spectrogram, float32 (frames, bins), of sound (samples,) in [-1, 1].

    The Perceiver papers do not publish the parameters of their mel spectrograms. These are common ones; a model that
    was trained with others must be given its own spectrogram as an array:

    - Frame i is centred at sample (i + ½)·samples/frames, so the frames cover the sound evenly; zeros around it.
    - A Hann window of 25 ms, or of two and a half hops where that is longer, and a power spectrum |FFT|² of it. The
      FFT is padded to the power of two at which even the narrowest band holds a frequency.
    - ``bins`` triangles with peak 1, whose corners are evenly spaced from 0 to half the sample rate on HTK's mel
      scale, 2595·log10(1 + f/700).
    - The natural logarithm of the energy, which is 1e-10 at least.

    Raises InputError: fewer samples than frames.
    """
    samples = len(sound)
    if samples < frames:
        raise InputError(f"{samples} samples cannot make {frames} frames", "give a longer recording")
    width = int(np.ceil(max(WINDOW_SECONDS * sample_rate, 2.5 * samples / frames)))
    filters = _mel_filters(sample_rate, width, bins)
    size = 2 * (len(filters) - 1)
    starts = np.floor((np.arange(frames) + 0.5) * samples / frames).astype(np.int64) - width // 2 + width
    padded = np.pad(sound.astype(np.float64), width)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
    energies = np.empty((frames, bins))
    for i, start in enumerate(starts):  # one by one: all frames at once would hold them several times over
        spectrum = np.fft.rfft(padded[start : start + width] * window, size)
        energies[i] = (spectrum.real**2 + spectrum.imag**2) @ filters
    return np.log(np.maximum(energies, FLOOR)).astype(np.float32)


def mel_corners(sample_rate: int, bins: int) -> npt.NDArray[np.float64]:
    """Corners of the triangles in Hz, (bins + 2,): triangle i rises from corner i, peaks at i + 1, ends at i + 2."""
    highest = 2595 * np.log10(1 + sample_rate / 2 / 700)
    return np.asarray(700 * (10 ** (np.linspace(0, highest, bins + 2) / 2595) - 1))


@lru_cache(maxsize=4)
def _mel_filters(sample_rate: int, width: int, bins: int) -> npt.NDArray[np.float64]:
    """Weights (frequencies, bins) of each frequency of the FFT in each triangle."""
    corners = mel_corners(sample_rate, bins)
    narrowest = float(corners[1] - corners[0])
    size = 1 << int(np.ceil(np.log2(max(width, sample_rate / narrowest))))
    frequencies = np.arange(size // 2 + 1)[:, None] * (sample_rate / size)
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequencies - low) / (peak - low), (high - frequencies) / (high - peak)
    return np.maximum(np.minimum(rising, falling), 0.0)
