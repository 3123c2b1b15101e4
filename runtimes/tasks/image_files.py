# SPDX-License-Identifier: Apache-2.0
"""Read images with Pillow; crop, resize and normalize them by the manifest's steps. RGB throughout.

Each step reproduces the Pillow backend of transformers' image processors bit for bit.

OpenCV's INTER_CUBIC and INTER_LINEAR for uint8 images, which do not antialias, are implemented in numpy. DeepMind's
notebooks resize with OpenCV, so their models were trained on its pixels. OpenCV builds differ from one another: with
Intel's IPP (the x86 wheels, and so the reference vectors) cubic weights are real numbers, elsewhere they are multiples
of 1/2048. Cubic follows IPP here; linear never uses IPP. Compared with opencv-python 5.0 on x86, one value in 700 of a
cubic resize differs by 1 gray level, and no value of a linear one differs.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes import preprocessing as steps
from perceiver_export.runtimes.errors import InputError, check_choice, require
from perceiver_export.runtimes.files import parsing
from perceiver_export.runtimes.preprocessing import ImagePreprocessing

if TYPE_CHECKING:
    from PIL.Image import Image


RgbImage = npt.NDArray[np.uint8]
_Taps = tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]

_A = -0.75  # the cubic kernel's parameter a; Pillow's is -0.5
_ONE = 2048  # the fixed-point 1 of OpenCV's linear weights


def resize_cubic(image: RgbImage, height: int, width: int) -> RgbImage:
    """(H, W, C) to (height, width, C) as ``cv2.resize(..., interpolation=cv2.INTER_CUBIC)``."""
    across = _weigh(image, _cubic_taps(image.shape[1], width), axis=1)
    down = _weigh(across, _cubic_taps(image.shape[0], height), axis=0)
    return np.clip(np.rint(down), 0, 255).astype(np.uint8)


def resize_linear(image: RgbImage, height: int, width: int) -> RgbImage:
    """(H, W, C) to (height, width, C) as ``cv2.resize``, whose default is INTER_LINEAR."""
    across = _weigh(image, _linear_taps(image.shape[1], width), axis=1).astype(np.int32)
    (upper, lower), weights = _linear_taps(image.shape[0], height)
    # OpenCV drops bits between the steps of this sum to stay within 16 bits; these shifts drop the same bits.
    across >>= 4
    shares = weights.astype(np.int32)[:, :, None, None]
    total = ((across[upper] * shares[0]) >> 16) + ((across[lower] * shares[1]) >> 16)
    return np.asarray((total + 2) >> 2, np.uint8)


def _weigh(values: npt.NDArray[Any], taps: _Taps, axis: int) -> npt.NDArray[np.float64]:
    """The sum over taps of ``values[index] · weight`` along an axis of (H, W, C)."""
    along = (slice(None), None, None) if axis == 0 else (slice(None), None)
    terms = (values.take(index, axis) * weight[along] for index, weight in zip(*taps, strict=True))
    return np.asarray(sum(terms))


@lru_cache(maxsize=8)
def _cubic_taps(size: int, new_size: int) -> _Taps:
    """Indices and weights (4, new_size) of the old pixels that contribute to each new one; edge pixels are repeated.

    Keys' cubic kernel. The arrays are cached: do not change them.
    """
    first, x = _left_of(size, new_size, np.float64)
    near, far = np.stack([x, 1 - x]), np.stack([1 + x, 2 - x])
    near = ((_A + 2) * near - (_A + 3)) * near**2 + 1
    far = ((far - 5) * far + 8) * far * _A - 4 * _A
    return np.clip(first + np.arange(-1, 3)[:, None], 0, size - 1), np.stack([far[0], *near, far[1]])


@lru_cache(maxsize=8)
def _linear_taps(size: int, new_size: int) -> _Taps:
    """Like `_cubic_taps`, for two neighbors, (2, new_size); the weights are integers, where `_ONE` stands for 1."""
    # Positions are float32 as in OpenCV: the last bit decides how a weight that ends in .5 is rounded.
    first, x = _left_of(size, new_size, np.float32)
    return np.clip(first + np.arange(2)[:, None], 0, size - 1), np.rint(np.stack([1 - x, x]) * _ONE)


def _left_of(size: int, new_size: int, kind: type[np.floating]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The old pixel to the left of each new pixel's center, and the distance between their centers.

    The positions are rounded to ``kind``.
    """
    centers = ((np.arange(new_size) + 0.5) * (size / new_size) - 0.5).astype(kind).astype(np.float64)
    floor = np.floor(centers)
    return floor.astype(np.intp), centers - floor


# A file, a Pillow image, or uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
ImageLike: TypeAlias = "str | os.PathLike[str] | Image | npt.NDArray[np.uint8]"
# The channel order of an array; OpenCV's frames are "bgr". It does not affect files and Pillow images.
Color = Literal["rgb", "bgr"]
_Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
_Size = tuple[int, int]

# Suffixes of the files in a directory that count as images.
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

# Only these decoders of Pillow are used; others start programs (EPS: Ghostscript) or are rarely audited.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_MOST_PIXELS = 80_000_000
_UNREADABLE = "is not a readable image", "give a complete PNG, JPEG or similar in RGB"


def take_image(image: ImageLike, color: Color = "rgb") -> RgbImage:
    """uint8 RGB (H, W, 3) of an image file, a Pillow image, or a uint8 array with channels in the order ``color``.

    A Pillow image is treated like a file: rotated as its EXIF says, converted to RGB, and its alpha dropped. An array's
    alpha is also dropped. Raises InputError: not a readable image; MissingDependencyError: a file without Pillow;
    UsageError: another ``color``.
    """
    check_choice("color", color, ("rgb", "bgr"))
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if is_pillow(image):
        return _of_pillow(cast("Image", image), "the image")
    if image is None:
        raise InputError("an image is None", "check the file's name: OpenCV returns None if it cannot read a file")
    found = as_image(as_array(image))
    return found if color == "rgb" else found[:, :, ::-1]


def is_pillow(given: object) -> bool:
    """Whether this is a Pillow image. It does not import Pillow."""
    # While another thread imports Pillow, its module has no class yet, and so there is no image.
    return isinstance(given, getattr(sys.modules.get("PIL.Image"), "Image", ()))


def is_image(given: object) -> bool:
    """Whether this is a single image: a path, a Pillow image, or an array that `as_image` accepts."""
    if isinstance(given, np.ndarray):
        return given.ndim == 2 or (given.ndim == 3 and given.shape[2] in (1, 3, 4))
    return isinstance(given, (str, os.PathLike)) or is_pillow(given)


def read_image(path: str | os.PathLike[str]) -> RgbImage:
    """An image file as uint8 RGB (H, W, 3), rotated as its EXIF says.

    Raises InputError: missing, not an image, truncated or too large; MissingDependencyError: no Pillow.
    """
    name = os.fspath(path)
    pillow = require("PIL.Image", "reading image files", "images")
    with parsing(name, *_UNREADABLE), pillow.open(path, formats=_FORMATS) as image:
        return _of_pillow(image, name)


def _of_pillow(image: Image, name: str) -> RgbImage:
    from PIL import ImageOps

    if image.width * image.height > _MOST_PIXELS:
        raise InputError(f"{name} is too large: {image.width} × {image.height} pixels", "scale it down first")
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{name} has more than 8 bits per channel (mode {image.mode})", "convert it to 8 bits first")
    with parsing(name, *_UNREADABLE):  # truncated, damaged, or an unusual mode
        return as_image(np.asarray(ImageOps.exif_transpose(image).convert("RGB")))


def list_images(directory: str | os.PathLike[str]) -> list[Path]:
    """A directory's image files in the order of their names, numbers by value: frame2 before frame10.

    Raises InputError: not a readable directory, or no images in it.
    """
    return list_files(directory, IMAGE_SUFFIXES, "images")


def list_files(directory: str | os.PathLike[str], suffixes: Collection[str], what: str) -> list[Path]:
    """Like `list_images`, for files with other suffixes; ``what`` names them in errors, in the plural."""
    path = Path(directory)
    try:
        found = [file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file()]
    except OSError as error:
        raise InputError(f"{path} is not a readable directory", f"give a directory of {what}") from error
    if not found:
        raise InputError(f"{path} contains no {what}", f"give files that end in {', '.join(sorted(suffixes))}")
    return sorted(found, key=_natural)


def _natural(file: Path) -> tuple[list[str | int], str]:
    parts: list[str | int] = list(re.split(r"([0-9]+)", file.name))
    parts[1::2] = map(int, parts[1::2])
    return parts, file.name


def as_array(given: Any) -> npt.NDArray[Any]:
    """An array from an array or nested lists. Raises InputError: lists of different lengths."""
    try:
        return np.asarray(given)
    except ValueError as error:
        raise InputError("the rows of a list differ in length", "give an array, or rows of equal length") from error


def as_image(array: npt.NDArray[Any]) -> RgbImage:
    """uint8 (H, W, 3) from a gray (H, W) or (H, W, 1), or a color (H, W, 3) or (H, W, 4) array. Raises InputError."""
    if array.dtype.kind in "UO":
        what = f"a list of {array.size} was" if array.ndim else "an object of another type was"
        raise InputError(f"{what} given as one image", "make a call for each image: a path, a Pillow image or an array")
    if array.dtype != np.uint8:
        raise InputError(f"an image has dtype {array.dtype}", "give uint8 values from 0 to 255")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"an image has shape {list(array.shape)}", "give (height, width) or (height, width, 3)")
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]


def to_input(image: npt.NDArray[Any], preprocessing: ImagePreprocessing) -> npt.NDArray[np.float32]:
    """An RGB image as the model's input, float32 (3, height, width).

    Raises InputError: not an image, or the steps do not give the model's size; MissingDependencyError: no Pillow.
    """
    prepared: _Pixels = as_image(image)
    for step in preprocessing.steps:
        prepared = _apply(prepared, step)
    wanted = (preprocessing.height, preprocessing.width)
    if prepared.shape[:2] != wanted:
        given, found, takes = (f"{shape[0]} × {shape[1]}" for shape in (image.shape, prepared.shape, wanted))
        said = f"an image of {given} is {found} after preprocessing, but the model takes {takes}"
        hint = "crop or resize the image first: this model's preprocessing keeps proportions or does not resize"
        raise InputError(said, hint)
    return np.ascontiguousarray(prepared.transpose(2, 0, 1), dtype=np.float32)


def values_of(pixels: RgbImage, preprocessing: ImagePreprocessing) -> _Pixels:
    """The steps that change values, applied to each pixel of (H, W, 3), without resizing or cropping."""
    values: _Pixels = pixels
    for step in preprocessing.steps:
        if isinstance(step, (steps.Rescale, steps.Normalize, steps.ReverseChannels)):
            values = _apply(values, step)
    return values


def _apply(pixels: _Pixels, step: steps.ImageStep) -> _Pixels:
    """One step on (H, W, 3): uint8 until a step scales the values, then float32."""
    size = (pixels.shape[0], pixels.shape[1])
    if isinstance(step, (steps.Resize, steps.ResizeEdge, steps.ResizeInto)):
        return resize(cast("RgbImage", pixels), *_new_size(size, step), step.resample)
    if isinstance(step, steps.CenterCrop):
        return center_crop(pixels, step.height, step.width)
    if isinstance(step, steps.CenterCropShare):
        rows, columns = (int(share * min(size)) for share in (step.vertical, step.horizontal))
        return center_crop(pixels, rows, columns, step.round_up)
    if isinstance(step, steps.Rescale):
        rescaled = (pixels.astype(np.float64) * step.factor).astype(np.float32)
        return rescaled + np.float32(step.offset) if step.offset else rescaled
    if isinstance(step, steps.Normalize):
        mean, std = (np.array(values, np.float32) for values in (step.mean, step.std))
        return np.asarray((pixels.astype(np.float32) - mean) / std)
    assert isinstance(step, steps.ReverseChannels)
    return pixels[:, :, ::-1]


def center_crop(pixels: _Pixels, height: int, width: int, round_up: bool = False) -> _Pixels:
    """The middle height × width of (H, W, 3), see `CenterCropShare`; a smaller image is padded with zeros."""
    _check_size(height, width)
    high, wide = pixels.shape[:2]
    if height > high or width > wide:
        # An odd border is one pixel wider above and on the left, as in transformers.
        borders = [max(0, new - old) for new, old in ((height, high), (width, wide))]
        margins = [*(((border + 1) // 2, border // 2) for border in borders), (0, 0)]
        pixels = cast("_Pixels", np.pad(pixels, margins))
        high, wide = pixels.shape[:2]
    top, left = (high - height + round_up) // 2, (wide - width + round_up) // 2
    return pixels[top : top + height, left : left + width]


def _new_size(size: _Size, step: steps.Resize | steps.ResizeEdge | steps.ResizeInto) -> _Size:
    """The new (height, width), rounded for each kind of step as in transformers."""
    height, width = size
    if isinstance(step, steps.Resize):
        return step.height, step.width
    if isinstance(step, steps.ResizeInto):
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


def resize(image: RgbImage, height: int, width: int, resample: str) -> RgbImage:
    """Resize (H, W, 3) with Pillow's filter ``resample``; ``opencv-bicubic`` is `resize_cubic`."""
    _check_size(height, width)
    if resample == "opencv-bicubic":
        return resize_cubic(image, height, width)
    if image.shape[:2] == (height, width):
        return image
    pillow = require("PIL.Image", "resizing images", "images")
    source = pillow.fromarray(np.ascontiguousarray(image))
    return np.asarray(source.resize((width, height), pillow.Resampling[resample.upper()]))


def _check_size(height: int, width: int) -> None:
    """Raise InputError if a side vanishes or the image is too large, as with extreme proportions."""
    if min(height, width) < 1 or height * width > _MOST_PIXELS:
        raise InputError(f"preprocessing would make the image {height} × {width}", "give a larger or less narrow one")
