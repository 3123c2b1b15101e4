# SPDX-License-Identifier: Apache-2.0
"""Optical flow as files: Middlebury's .flo, .npy, and an image in the colours of Middlebury's wheel."""

from __future__ import annotations

import io
import os
from functools import lru_cache
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
_UNKNOWN = 1e9  # Middlebury marks pixels of unknown flow by larger numbers


def write_flow(path: str | os.PathLike[str], flow: npt.NDArray[Any]) -> None:
    """Write a flow (H, W, 2) as the name's ending says: .flo, .npy (float32), or .png, an image to look at.

    The file appears when it is complete. Raises InputError: another ending, no flow, or a place that cannot be
    written; MissingDependencyError: .png without Pillow.
    """
    target = Path(path)
    encode = {".flo": _flo, ".npy": _npy, ".png": _png}[check_format(target)]
    write_bytes(target, encode(as_flow(flow)))


def check_format(path: Path) -> str:
    """The ending of a file that `write_flow` can write. Raises InputError."""
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise InputError(f"{path} has an unknown ending", f"name it {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    return ending


def as_flow(array: npt.NDArray[Any]) -> Flow:
    """float32 (H, W, 2), or InputError."""
    if array.ndim != 3 or array.shape[2] != 2 or 0 in array.shape or array.dtype.kind != "f":
        raise InputError(f"a flow has {array.dtype} and shape {list(array.shape)}", "give floats, (height, width, 2)")
    return array.astype(np.float32, copy=False)


def flow_picture(flow: npt.NDArray[Any], largest: float | None = None) -> npt.NDArray[np.uint8]:
    """A flow (H, W, 2) as colours, uint8 (H, W, 3): the hue is the direction, the strength of the colour the length.

    Red is right, yellow down, blue left, violet up, as Middlebury's evaluation shows flow (Baker et al., "A Database
    and Evaluation Methodology for Optical Flow", IJCV 2011). A displacement of ``largest`` pixels has the full colour,
    longer ones are darkened; None takes the longest of this flow. Unknown flow (NaN, or above 1e9) is black.
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
    """Colours (..., 3), 0 to 1, of angles from −π to π, between the two nearest of the wheel."""
    wheel = color_wheel() / 255.0
    position = (angles / np.pi + 1.0) / 2.0 * (len(wheel) - 1)
    first = np.floor(position).astype(np.intp)
    share = (position - first)[..., None]
    return (1.0 - share) * wheel[first] + share * wheel[(first + 1) % len(wheel)]


@lru_cache(maxsize=1)
def color_wheel() -> npt.NDArray[np.float64]:
    """Middlebury's 55 hues (55, 3), 0 to 255. Cached: do not change it.

    Red to yellow, green, cyan, blue, magenta and back; the steps of each stretch are such that they look alike.
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
    require("PIL.Image", "writing .png", "pip install 'perceiver-export[images]'").fromarray(flow_picture(flow)).save(
        buffer, format="PNG"
    )
    return buffer.getvalue()
