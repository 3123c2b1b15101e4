# SPDX-License-Identifier: Apache-2.0
"""Video frames as DeepMind's notebook prepares them: the middle square, resized, in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.opencv_resize import resize_linear
from perceiver_export.runtimes.pictures import Picture, as_picture

# A pixel's value / 255 in float64, rounded once.
_UNIT = (np.arange(256) / 255.0).astype(np.float32)


def prepare_frames(frames: Sequence[npt.NDArray[Any]], height: int, width: int) -> npt.NDArray[np.float32]:
    """Frames, uint8 (H, W, 3) RGB, as float32 (T, height, width, 3) in [0, 1].

    Each is cropped to its middle square and resized as OpenCV's INTER_LINEAR does it. Raises InputError: no frame, or
    one that is not a picture. Frames may differ in size.
    """
    if len(frames) == 0:
        raise InputError("there are no frames", "give one or more pictures")
    return np.stack([_UNIT[resize_linear(_middle_square(as_picture(frame)), height, width)] for frame in frames])


def _middle_square(picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    side = min(height, width)
    # Both halves are rounded down before they are subtracted, so an odd remainder may fall on either side.
    top, left = height // 2 - side // 2, width // 2 - side // 2
    return picture[top : top + side, left : left + side]
