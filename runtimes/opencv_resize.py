# SPDX-License-Identifier: Apache-2.0
"""OpenCV's resize of uint8 pictures in numpy: INTER_CUBIC and INTER_LINEAR, which do not antialias.

DeepMind's notebooks resize with OpenCV, so their models were given its pixels. OpenCV does not agree with itself
to the last bit: its cubic weights are real numbers where Intel's IPP is built in (the wheels for x86, so also the
reference vectors) and whole 1/2048ths elsewhere. This follows the first for cubic; linear never goes through IPP.
Compared with opencv-python 5.0 on x86, one value in 700 of a cubic resize differs, by 1 grey level, and none of a
linear one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
_Taps = tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]

_A = -0.75  # of the cubic kernel; Pillow's is -0.5
_ONE = 2048  # the fixed-point 1 of OpenCV's linear weights


def resize_cubic(picture: Picture, height: int, width: int) -> Picture:
    """(H, W, C) to (height, width, C) as ``cv2.resize(..., interpolation=cv2.INTER_CUBIC)``."""
    across = _weigh(picture, *_cubic_taps(picture.shape[1], width), axis=1)
    down = _weigh(across, *_cubic_taps(picture.shape[0], height), axis=0)
    return np.clip(np.rint(down), 0, 255).astype(np.uint8)


def resize_linear(picture: Picture, height: int, width: int) -> Picture:
    """(H, W, C) to (height, width, C) as ``cv2.resize``, whose default is INTER_LINEAR."""
    across = _weigh(picture, *_linear_taps(picture.shape[1], width), axis=1).astype(np.int32)
    (upper, lower), weights = _linear_taps(picture.shape[0], height)
    # OpenCV drops bits between the steps of this sum to stay within 16, and we drop the same ones.
    across >>= 4
    shares = weights.astype(np.int32)[:, :, None, None]
    total = ((across[upper] * shares[0]) >> 16) + ((across[lower] * shares[1]) >> 16)
    rounded: Picture = ((total + 2) >> 2).astype(np.uint8)
    return rounded


def _weigh(
    values: npt.NDArray[np.uint8] | npt.NDArray[np.float64],
    indices: npt.NDArray[np.intp],
    weights: npt.NDArray[np.float64],
    axis: int,
) -> npt.NDArray[np.float64]:
    """Σ over taps of ``values[indices[tap]] · weights[tap]`` along an axis of (H, W, C)."""
    along = (slice(None), None, None) if axis == 0 else (slice(None), None)
    total: npt.NDArray[np.float64] = values.take(indices[0], axis) * weights[0][along]
    for tap in range(1, len(indices)):
        total += values.take(indices[tap], axis) * weights[tap][along]
    return total


@lru_cache(maxsize=8)
def _cubic_taps(size: int, new_size: int) -> _Taps:
    """Indices and weights (4, new_size) of the pixels that make each new one; the edge is repeated.

    Cached: do not change them.
    """
    first, x = _apart(_centers(size, new_size))
    weights = _cubic(np.stack([1 + x, x, 1 - x, 2 - x]))
    return np.clip(first + np.arange(-1, 3)[:, None], 0, size - 1), weights


def _cubic(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' kernel from 0 to 2 pixels away."""
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * _A - 4 * _A
    return np.where(distance <= 1, near, far)


@lru_cache(maxsize=8)
def _linear_taps(size: int, new_size: int) -> _Taps:
    """The same for two neighbours, (2, new_size); the weights are whole numbers, of which `_ONE` is 1."""
    # Positions in float32 as OpenCV has them: its last bit decides how a weight that ends in a half is rounded.
    first, x = _apart(_centers(size, new_size).astype(np.float32).astype(np.float64))
    return np.clip(first + np.arange(2)[:, None], 0, size - 1), np.rint(np.stack([1 - x, x]) * _ONE)


def _centers(size: int, new_size: int) -> npt.NDArray[np.float64]:
    """Where the centre of each new pixel falls, counted in old ones."""
    centers: npt.NDArray[np.float64] = (np.arange(new_size, dtype=np.float64) + 0.5) * (size / new_size) - 0.5
    return centers


def _apart(centers: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The old pixel to the left, and how far beyond its centre the position is."""
    floor: npt.NDArray[np.float64] = np.floor(centers)
    return floor.astype(np.intp), centers - floor
