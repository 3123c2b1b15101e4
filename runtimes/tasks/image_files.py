# SPDX-License-Identifier: Apache-2.0
"""Read images with Pillow; crop, resize and normalise them by the manifest's steps. RGB throughout.

Each step reproduces the Pillow backend of transformers' image processors to the last bit.

OpenCV's resize of uint8 images is here in numpy: INTER_CUBIC and INTER_LINEAR, which do not antialias. DeepMind's
notebooks resize with OpenCV, so their models were trained on its pixels. OpenCV does not agree with itself to the last
bit: its cubic weights are real numbers if Intel's IPP is built in (the wheels for x86, so also the reference vectors)
and whole 1/2048ths elsewhere. This follows the first for cubic; linear never goes through IPP.
Compared with opencv-python 5.0 on x86, one value in 700 of a cubic resize differs, by 1 grey level, and none of a
linear one.
"""

from __future__ import annotations

import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError, check_choice, require
from perceiver_export.runtimes.files import parsing
from perceiver_export.runtimes.preprocessing import (
    CenterCrop,
    CenterCropShare,
    ImagePreprocessing,
    ImageStep,
    Normalize,
    Rescale,
    Resize,
    ResizeEdge,
    ResizeInto,
    ReverseChannels,
)

if TYPE_CHECKING:
    from PIL.Image import Image


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


# A file, a Pillow image, or uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
PictureLike: TypeAlias = "str | os.PathLike[str] | Image | npt.NDArray[np.uint8]"
# The order of an array's channels. Files and Pillow images know theirs; OpenCV's frames are "bgr".
Color = Literal["rgb", "bgr"]
_Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
_Size = tuple[int, int]

# Files of a directory that count as images.
PICTURE_FILES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

# Pillow's decoders of these; others start programs (EPS: Ghostscript) or are rarely looked at.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_MOST_PIXELS = 80_000_000
INSTALL = "pip install 'perceiver-export[images]'"


def take_picture(picture: PictureLike, color: Color = "rgb") -> Picture:
    """uint8 RGB (H, W, 3) of an image file, a Pillow image or a uint8 array whose channels are in ``color`` order.

    A Pillow image is taken as a file is: turned upright, palettes and CMYK become RGB, alpha is dropped. An array's
    alpha is dropped too. Raises InputError: not an image that can be read; MissingDependencyError: a file without
    Pillow; UsageError: another ``color``.
    """
    check_choice("color", color, ("rgb", "bgr"))
    if isinstance(picture, (str, os.PathLike)):
        return read_picture(picture)
    if is_pillow(picture):
        return _of_pillow(cast("Image", picture), "the image")
    found = as_picture(as_array(picture))
    return found if color == "rgb" else found[:, :, ::-1]


def is_pillow(given: object) -> bool:
    """Whether this is a Pillow image. Pillow is not loaded to find out."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(given, pillow.Image)


def is_picture(given: object) -> bool:
    """Whether this is one image, and not several: a path, a Pillow image, or an array that `as_picture` takes."""
    if isinstance(given, np.ndarray):
        return given.ndim == 2 or (given.ndim == 3 and given.shape[2] in (1, 3, 4))
    return isinstance(given, (str, os.PathLike)) or is_pillow(given)


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """An image file as uint8 RGB (H, W, 3), turned upright as its EXIF says.

    Raises InputError: missing, not an image, cut short, or too large; MissingDependencyError: no Pillow.
    """
    name = os.fspath(path)
    pillow = require("PIL.Image", "reading image files", INSTALL)
    reading = parsing(name, "is not an image that can be read", "give a PNG, JPEG or similar")
    with reading, pillow.open(path, formats=_FORMATS) as image:
        return _of_pillow(image, name)


def _of_pillow(image: Image, name: str) -> Picture:
    from PIL import ImageOps

    if image.width * image.height > _MOST_PIXELS:
        raise InputError(f"{name} has {image.width} × {image.height} pixels", "scale it down first")
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{name} has more than 8 bits a channel (mode {image.mode})", "convert it to 8 bits first")
    with parsing(name, "cannot be read as RGB", "convert it to RGB first"):  # cut short, damaged, or an odd mode
        return as_picture(np.asarray(ImageOps.exif_transpose(image).convert("RGB")))


def picture_files(directory: str | os.PathLike[str]) -> list[Path]:
    """A directory's image files by name, numbers as numbers: frame2 before frame10.

    Raises InputError: no directory, or no images in it.
    """
    path = Path(directory)
    try:
        found = [file for file in path.iterdir() if file.suffix.lower() in PICTURE_FILES and file.is_file()]
    except OSError as error:
        raise InputError(f"{path} is not a directory that can be read", "give a directory of images") from error
    if not found:
        raise InputError(f"{path} holds no images", f"images end in {', '.join(sorted(PICTURE_FILES))}")
    return sorted(found, key=_natural)


def _natural(file: Path) -> tuple[list[str | int], str]:
    parts: list[str | int] = list(re.split(r"([0-9]+)", file.name))
    parts[1::2] = map(int, parts[1::2])
    return parts, file.name


def as_array(given: Any) -> npt.NDArray[Any]:
    """An array of an array or of nested lists. Raises InputError: lists of different lengths."""
    try:
        return np.asarray(given)
    except ValueError as error:
        raise InputError("the rows of a list differ in length", "give an array, or rows of one length") from error


def as_picture(array: npt.NDArray[Any]) -> Picture:
    """uint8 (H, W, 3) of a grey (H, W), (H, W, 1), colour (H, W, 3) or (H, W, 4) array. Raises InputError."""
    if array.dtype != np.uint8:
        raise InputError(f"an image has dtype {array.dtype}", "give uint8, 0 to 255")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"an image has shape {list(array.shape)}", "give (height, width) or (height, width, 3)")
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]


def to_input(picture: npt.NDArray[Any], preprocessing: ImagePreprocessing) -> npt.NDArray[np.float32]:
    """An RGB image as the model's input, float32 (3, height, width).

    Raises InputError: not an image, or one that the steps leave in another size; MissingDependencyError: no Pillow.
    """
    prepared: _Pixels = as_picture(picture)
    for step in preprocessing.steps:
        prepared = _apply(prepared, step)
    (height, width), wanted = prepared.shape[:2], (preprocessing.height, preprocessing.width)
    if (height, width) != wanted:
        raise InputError(
            f"an image of {picture.shape[0]} × {picture.shape[1]} is {height} × {width} after preprocessing, the model"
            f" takes {wanted[0]} × {wanted[1]}",
            "this model's preprocessing keeps proportions or does not resize: crop or resize the image first",
        )
    return np.ascontiguousarray(prepared.transpose(2, 0, 1), dtype=np.float32)


def values_of(pixels: Picture, preprocessing: ImagePreprocessing) -> _Pixels:
    """The steps that change values, applied to each pixel of (H, W, 3), without resizing or cropping."""
    values: _Pixels = pixels
    for step in preprocessing.steps:
        if isinstance(step, (Rescale, Normalize, ReverseChannels)):
            values = _apply(values, step)
    return values


def _apply(pixels: _Pixels, step: ImageStep) -> _Pixels:
    """One step on (H, W, 3): uint8 until a step scales the values, then float32."""
    size = (pixels.shape[0], pixels.shape[1])
    if isinstance(step, (Resize, ResizeEdge, ResizeInto)):
        return resize(cast("Picture", pixels), *_new_size(size, step), step.resample)
    if isinstance(step, CenterCrop):
        return center_crop(pixels, step.height, step.width)
    if isinstance(step, CenterCropShare):
        rows, columns = (int(share * min(size)) for share in (step.vertical, step.horizontal))
        return center_crop(pixels, rows, columns, step.round_up)
    if isinstance(step, Rescale):
        rescaled = (pixels.astype(np.float64) * step.factor).astype(np.float32)
        return rescaled + np.float32(step.offset) if step.offset else rescaled
    if isinstance(step, Normalize):
        mean, std = (np.array(values, np.float32) for values in (step.mean, step.std))
        normalized: npt.NDArray[np.float32] = (pixels.astype(np.float32) - mean) / std
        return normalized
    assert isinstance(step, ReverseChannels)
    return pixels[:, :, ::-1]


def center_crop(pixels: _Pixels, height: int, width: int, round_up: bool = False) -> _Pixels:
    """The middle height × width of (H, W, 3), see `CenterCropShare`; a smaller image gets a border of zeros."""
    _check_size(height, width)
    high, wide = pixels.shape[:2]
    if height > high or width > wide:
        # An odd border is a pixel wider above and left, as transformers has it.
        borders = [max(0, new - old) for new, old in ((height, high), (width, wide))]
        margins = [*(((border + 1) // 2, border // 2) for border in borders), (0, 0)]
        pixels = cast("_Pixels", np.pad(pixels, margins))
        high, wide = pixels.shape[:2]
    top, left = (high - height + round_up) // 2, (wide - width + round_up) // 2
    return pixels[top : top + height, left : left + width]


def _new_size(size: _Size, step: Resize | ResizeEdge | ResizeInto) -> _Size:
    """(height, width) to resize to, each form rounded as in transformers."""
    height, width = size
    if isinstance(step, Resize):
        return step.height, step.width
    if isinstance(step, ResizeInto):
        scale = min(step.height / height, step.width / width)
        return int(height * scale), int(width * scale)
    short, long = min(size), max(size)
    shortest: float = step.shortest
    if step.longest and long / short * step.shortest > step.longest:
        shortest = step.longest * float(short) / long
    edges = round(shortest), int(shortest * long / short)
    if step.longest and edges[0] == short:
        edges = short, long
    return edges if height <= width else edges[::-1]


def resize(picture: Picture, height: int, width: int, resample: str) -> Picture:
    """Resize (H, W, 3) with Pillow's filter of that name, or OpenCV's ``opencv-bicubic``, see `resize_cubic`."""
    _check_size(height, width)
    if resample == "opencv-bicubic":
        return resize_cubic(picture, height, width)
    if picture.shape[:2] == (height, width):
        return picture
    pillow = require("PIL.Image", "resizing images", INSTALL)
    image = pillow.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), pillow.Resampling[resample.upper()]))


def _check_size(height: int, width: int) -> None:
    """Raise InputError if proportions are so extreme that a side vanishes or memory runs out."""
    if min(height, width) < 1 or height * width > _MOST_PIXELS:
        raise InputError(
            f"an image would be {height} × {width} after preprocessing", "give a larger or less narrow image"
        )
