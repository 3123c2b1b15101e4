# SPDX-License-Identifier: Apache-2.0
"""Write optical flow as Middlebury's .flo, as .npy, or as an image in the colors of Middlebury's wheel."""

from __future__ import annotations

import io
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError, require
from perceiver_export.runtimes.files import write_bytes

Flow = npt.NDArray[np.float32]

FORMATS = (".flo", ".npy", ".png")
_TAG = b"PIEH"  # 202021.25 as a little-endian float32
_UNKNOWN = 1e9  # Middlebury marks pixels of unknown flow with larger values


def write_flow(path: str | os.PathLike[str], flow: npt.NDArray[Any]) -> None:
    """Write a flow (H, W, 2) in the format of the name's suffix: .flo, .npy (float32), or .png, a color image.

    The file appears only when it is complete. Raises InputError: another suffix, an array that is not a flow, or a file
    that cannot be written; MissingDependencyError: .png without Pillow.
    """
    target = Path(path)
    encode = {".flo": _flo, ".npy": _npy, ".png": _png}[check_format(target)]
    write_bytes(target, encode(as_flow(flow)))


def check_format(path: Path) -> str:
    """The suffix of a file that `write_flow` can write. Raises InputError."""
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise InputError(f"{path} has an unknown suffix", f"use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    return ending


def as_flow(array: npt.NDArray[Any]) -> Flow:
    """The array as float32 (H, W, 2). Raises InputError: not floating point, or another shape."""
    if array.ndim != 3 or array.shape[2] != 2 or 0 in array.shape or array.dtype.kind != "f":
        raise InputError(f"the flow is {array.dtype} {list(array.shape)}", "give floating point (height, width, 2)")
    return array.astype(np.float32, copy=False)


def flow_image(flow: npt.NDArray[Any], largest: float | None = None) -> npt.NDArray[np.uint8]:
    """A flow (H, W, 2) as colors, uint8 (H, W, 3): the hue shows the direction, the saturation the length.

    Red is right, yellow down, blue left and violet up, as in Middlebury's evaluation (Baker et al., "A Database and
    Evaluation Methodology for Optical Flow", IJCV 2011). A displacement of ``largest`` pixels has the full color, and
    longer ones are darker; None means the longest of this flow. Unknown flow (NaN, or above 1e9) is black.
    """
    right, down = (as_flow(flow)[..., axis].astype(np.float64) for axis in (0, 1))
    with np.errstate(invalid="ignore"):
        known = (np.abs(right) <= _UNKNOWN) & (np.abs(down) <= _UNKNOWN)
    right, down = np.where(known, right, 0.0), np.where(known, down, 0.0)
    length = np.hypot(right, down)
    full = float(length.max()) if largest is None else largest
    length = (length / full if full > 0 else length)[..., None]
    hue = _hues(np.arctan2(-down, -right))
    color = np.where(length <= 1.0, 1.0 - length * (1.0 - hue), 0.75 * hue)
    return np.where(known[..., None], np.floor(255.0 * color), 0.0).astype(np.uint8)


def _hues(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Colors (..., 3), 0 to 1, of angles from −π to π, interpolated between the two nearest hues of the wheel."""
    wheel = color_wheel() / 255.0
    position = (angles / np.pi + 1.0) / 2.0 * (len(wheel) - 1)
    first = np.floor(position).astype(np.intp)
    share = (position - first)[..., None]
    return (1.0 - share) * wheel[first] + share * wheel[(first + 1) % len(wheel)]


def color_wheel() -> npt.NDArray[np.float64]:
    """Middlebury's 55 hues (55, 3), 0 to 255.

    From red to yellow, green, cyan, blue, magenta and back, in steps that look equally large.
    """
    corners = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]]) * 255.0
    stretches = []
    for (start, end), steps in zip(pairwise(corners), (15, 6, 4, 11, 13, 6), strict=True):
        rising = np.floor(255.0 * np.arange(steps)[:, None] / steps)
        stretches.append(start + np.sign(end - start) * rising)
    return np.concatenate(stretches)


def _flo(flow: Flow) -> bytes:
    height, width = flow.shape[:2]
    return _TAG + np.array([width, height], "<i4").tobytes() + flow.astype("<f4").tobytes()


def _npy(flow: Flow) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, flow, allow_pickle=False)
    return buffer.getvalue()


def _png(flow: Flow) -> bytes:
    buffer = io.BytesIO()
    require("PIL.Image", "writing .png", "images").fromarray(flow_image(flow)).save(buffer, format="PNG")
    return buffer.getvalue()
