# SPDX-License-Identifier: Apache-2.0
"""What tasks are given as files or arrays: a picture, a .npy file, or a video's frames in one of several forms."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.pictures import Picture, as_picture, picture_files, read_picture

PictureLike = str | os.PathLike[str] | npt.NDArray[np.uint8]
FramesLike = str | os.PathLike[str] | npt.NDArray[np.uint8] | Sequence[PictureLike]


def read_frames(frames: FramesLike, count: int) -> list[Picture]:
    """The first ``count`` frames, uint8 (H, W, 3), all of one size.

    ``frames`` is a directory of pictures (see `picture_files`), a .npy file or an array of uint8 (T, H, W, 3), or a
    sequence of picture files and uint8 arrays.

    Raises InputError: too few frames, of different sizes, not uint8, or not to be read.
    """
    found = open_frames(frames)
    if len(found) < count:
        raise InputError(f"frames given: {len(found)}", f"the model needs {count}")
    pictures = [take_picture(frame) for frame in found[:count]]
    for number, picture in enumerate(pictures):
        if picture.shape != pictures[0].shape:
            (height, width), (high, wide) = pictures[0].shape[:2], picture.shape[:2]
            raise InputError(
                f"frame {number} is {high} × {wide}, frame 0 is {height} × {width}", "give frames of one size"
            )
    return pictures


def open_frames(frames: FramesLike) -> Sequence[PictureLike]:
    """All frames there are, unread where they are files. Raises InputError."""
    if isinstance(frames, np.ndarray):
        return _frames_of_array(frames, "the video")
    if not isinstance(frames, (str, os.PathLike)):
        if not isinstance(frames, Sequence):
            raise InputError(
                f"the frames are of type {type(frames).__name__}", "give a directory, a .npy file, an array or a list"
            )
        return frames
    path = Path(frames)
    if path.is_dir():
        return picture_files(path)
    if path.suffix.lower() == ".npy":
        return _frames_of_array(load_npy(path), str(path))
    if not path.exists():
        raise InputError(f"{path} does not exist", "give a directory of pictures, or a .npy file")
    raise InputError(
        f"{path} is neither a directory of pictures nor a .npy file",
        f"take it apart first: mkdir frames && ffmpeg -i {shlex.quote(str(path))} frames/%05d.png",
    )


def take_picture(picture: PictureLike) -> Picture:
    """uint8 (H, W, 3) of a picture file or an array. Raises what `read_picture` and `as_picture` raise."""
    return read_picture(picture) if isinstance(picture, (str, os.PathLike)) else as_picture(as_array(picture))


def as_array(given: Any) -> npt.NDArray[Any]:
    """An array of an array or of nested lists. Raises InputError: lists of different lengths."""
    try:
        return np.asarray(given)
    except ValueError as error:
        raise InputError("the rows of a list differ in length", "give an array, or rows of one length") from error


def load_npy(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """The array of a .npy file, read as it is used. Raises InputError: not there, not a .npy, cut short, or objects."""
    name = os.fspath(path)
    try:
        array: npt.NDArray[Any] = np.lib.format.open_memmap(name, mode="r")
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist", "check the path") from error
    except Exception as error:
        # Damaged headers make numpy raise anything: ValueError, EOFError, TokenError. Python objects are never loaded.
        raise InputError(
            f"{name} is not a .npy file that can be read: {error}", "save numbers with numpy.save"
        ) from error
    return array


def _frames_of_array(array: npt.NDArray[Any], name: str) -> list[npt.NDArray[np.uint8]]:
    if array.dtype != np.uint8 or array.ndim != 4:
        raise InputError(
            f"{name} is {array.dtype} with shape {list(array.shape)}", "give uint8 (frames, height, width, 3)"
        )
    return list(array)
