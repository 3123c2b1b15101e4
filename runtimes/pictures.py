# SPDX-License-Identifier: Apache-2.0
"""Pictures in numpy: crop, resize and normalise as the manifest says. Only reading a file needs Pillow."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError, MissingDependencyError
from perceiver_export.runtimes.opencv_resize import resize_cubic
from perceiver_export.runtimes.preprocessing import ImagePreprocessing

Picture = npt.NDArray[np.uint8]
# Radius of each filter in source pixels at scale 1, as in Pillow.
_RADIUS = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
_OPENCV = "opencv-bicubic"  # DeepMind's resize, and with it goes DeepMind's crop

# Files of a directory that are taken for pictures.
PICTURE_FILES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

_MOST_PIXELS = 80_000_000
_ONE = float(1 << 22)  # the fixed-point 1 of Pillow's resampling weights


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """A picture file as uint8 (H, W, 3), turned upright as its EXIF says.

    Raises InputError: not there, not a picture, cut short, or absurdly large; MissingDependencyError: no Pillow.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependencyError(
            "reading picture files needs Pillow", "pip install 'perceiver-export[images]'"
        ) from error
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise InputError(f"{os.fspath(path)} has {image.width} × {image.height} pixels", "scale it down first")
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{os.fspath(path)} has more than 8 bits a channel", "convert it to 8 bits first")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.uint8)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{os.fspath(path)} does not exist", "check the path") from error
    except Exception as error:
        # Damaged files make Pillow raise anything: OSError, SyntaxError, TypeError, its own.
        raise InputError(
            f"{os.fspath(path)} is not a picture that can be read", "give a PNG, JPEG or similar"
        ) from error


def picture_files(directory: str | os.PathLike[str]) -> list[Path]:
    """A directory's picture files by name, numbers as numbers: frame2 before frame10.

    Raises InputError: no directory, or no pictures in it.
    """
    path = Path(directory)
    try:
        found = [file for file in path.iterdir() if file.suffix.lower() in PICTURE_FILES and file.is_file()]
    except OSError as error:
        raise InputError(f"{path} is not a directory that can be read", "give a directory of pictures") from error
    if not found:
        raise InputError(f"{path} holds no pictures", f"pictures end in {', '.join(sorted(PICTURE_FILES))}")
    return sorted(found, key=_natural)


def _natural(file: Path) -> tuple[list[str | int], str]:
    parts: list[str | int] = list(re.split(r"([0-9]+)", file.name))
    parts[1::2] = map(int, parts[1::2])
    return parts, file.name


def as_picture(array: npt.NDArray[Any]) -> Picture:
    """uint8 (H, W, 3) of a grey (H, W), (H, W, 1), colour (H, W, 3) or (H, W, 4) array. Raises InputError."""
    if array.dtype != np.uint8:
        raise InputError(f"a picture has dtype {array.dtype}", "give uint8, 0 to 255")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"a picture has shape {list(array.shape)}", "give (height, width) or (height, width, 3)")
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]


def to_input(picture: npt.NDArray[Any], steps: ImagePreprocessing) -> npt.NDArray[np.float32]:
    """One picture as the model's input, float32 (3, height, width)."""
    cropped = as_picture(picture)
    if steps.crop_fraction is not None:
        cropped = center_crop(cropped, steps.crop_fraction, round_up=steps.resample == _OPENCV)
    resized = resize(cropped, steps.height, steps.width, steps.resample)
    mean, std = (np.asarray(values, dtype=np.float32)[:, None, None] for values in (steps.mean, steps.std))
    return (resized.transpose(2, 0, 1).astype(np.float32) * np.float32(steps.scale) - mean) / std


def center_crop(picture: Picture, fraction: tuple[float, float], round_up: bool = False) -> Picture:
    """The middle of a picture: ``fraction`` of the shorter side, down and across.

    Where an odd number of pixels is left over, transformers' Perceiver begins half a pixel above and left of the
    middle, DeepMind's code (``round_up``) below and right of it.
    """
    height, width = picture.shape[:2]
    rows, columns = (max(1, int(share * min(height, width))) for share in fraction)
    top, left = ((whole - part + round_up) // 2 for whole, part in ((height, rows), (width, columns)))
    return picture[top : top + rows, left : left + columns]


def resize(picture: Picture, height: int, width: int, resample: str) -> Picture:
    """Resize (H, W, 3) with Pillow's antialiased filters, bit for bit: across first, rounded to uint8, then down.

    ``opencv-bicubic`` is OpenCV's cubic filter instead, see `resize_cubic`.
    """
    if resample == _OPENCV:
        return resize_cubic(picture, height, width)
    if picture.shape[1] != width:
        picture = _rounded(
            np.einsum("xw,hwc->hxc", _weights(picture.shape[1], width, resample), picture, optimize=True)
        )
    if picture.shape[0] != height:
        picture = _rounded(
            np.einsum("yh,hwc->ywc", _weights(picture.shape[0], height, resample), picture, optimize=True)
        )
    return picture


def _rounded(values: npt.NDArray[np.float64]) -> Picture:
    return np.clip(np.floor((values + _ONE / 2) / _ONE), 0, 255).astype(np.uint8)


@lru_cache(maxsize=8)
def _weights(size: int, new_size: int, resample: str) -> npt.NDArray[np.float64]:
    """Resampling matrix (new_size, size) in Pillow's fixed point: whole numbers, of which `_ONE` is 1.

    float64 holds sums of such weights times 0 to 255 exactly. Pixels outside the picture get no weight.
    """
    scale = size / new_size
    stretch = max(scale, 1.0)
    radius = _RADIUS[resample] * stretch
    weights = np.zeros((new_size, size))
    for row in range(new_size):
        center = (row + 0.5) * scale
        first, last = max(int(center - radius + 0.5), 0), min(int(center + radius + 0.5), size)
        taps = _filter((np.arange(first, last, dtype=np.float64) - center + 0.5) * (1.0 / stretch), resample)
        weights[row, first:last] = taps / taps.sum()
    return np.trunc(weights * _ONE + np.where(weights < 0, -0.5, 0.5))


def _filter(x: npt.NDArray[np.float64], resample: str) -> npt.NDArray[np.float64]:
    """Pillow's filter functions; its bicubic has a = -0.5."""
    x = np.abs(x)
    if resample == "bilinear":
        return np.maximum(1.0 - x, 0.0)
    if resample == "lanczos":
        return np.where(x < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))
