# SPDX-License-Identifier: Apache-2.0
"""Point clouds in numpy: .npy, .xyz text and ASCII .ply; a fixed number of points, centred in the cube [-1, 1]."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.frame_files import as_array, load_npy

# In float64, since clouds may lie far from the origin.
Points = npt.NDArray[np.float64]

POINT_FILES = (".npy", ".xyz", ".ply")
_XYZ = ("x", "y", "z")
# A line of its own: comments may say the word too.
_END_HEADER = re.compile(rb"(?:\r\n|\r|\n)[ \t]*end_header[ \t]*(?:\r\n|\r|\n|\Z)")
_MOST_DIGITS = 18  # of a count; Python reads no number of thousands of digits


def read_points(path: str | os.PathLike[str]) -> Points:
    """The points of a file, float64 (n, 3).

    - .npy: an array (n, 3).
    - .xyz: a line a point, three numbers with blanks or commas between; what follows ``#`` is a comment.
    - .ply: ASCII only; x, y and z of the element ``vertex``, other properties are left out.

    Raises InputError: not there, of another kind, not three numbers a point, no point, or a point that is not finite.
    """
    name, ending = os.fspath(path), Path(path).suffix.lower()
    if ending == ".npy":
        return as_points(load_npy(path), name)
    if ending not in POINT_FILES:
        raise InputError(f"{name} is not a point cloud that can be read", f"give {', '.join(POINT_FILES)}")
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist", "check the path") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}", "check the path and its permissions") from error
    rows = _ply(content, name) if ending == ".ply" else _xyz(content, name)
    return as_points(np.array(rows, dtype=np.float64).reshape(-1, 3), name)


def as_points(cloud: npt.ArrayLike, name: str = "the point cloud") -> Points:
    """float64 (n, 3) of numbers (n, 3). Raises InputError: other shapes, no point, NaN or infinity."""
    array = as_array(cloud)
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != 3:
        raise InputError(
            f"{name} is {array.dtype} with shape {list(array.shape)}",
            "give numbers (n, 3): x, y, z; of more columns take points[:, :3]",
        )
    if not len(array):
        raise InputError(f"{name} holds no point", "give one or more")
    points = array.astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(wrong):
        raise InputError(
            f"{name}: point {wrong[0]} is {array[wrong[0]].tolist()}; not finite: {len(wrong)} of {len(points)}",
            "take them out: points[numpy.isfinite(points).all(axis=1)]",
        )
    return points


def subsample(points: Points, count: int) -> Points:
    """At most ``count`` points: all of them, or every (n/count)-th, so that the same cloud gives the same points."""
    if len(points) <= count:
        return points
    return points[np.arange(count) * len(points) // count]


def into_unit_cube(points: Points) -> npt.NDArray[np.float32]:
    """Points (n, 3) moved so that their mean is 0, and scaled so that the largest coordinate is 1 or -1."""
    extent = np.abs(points).max() or 1.0
    # Divided first, the sum of large numbers does not overflow.
    centred = points / extent - (points / extent).mean(axis=0)
    radius = np.abs(centred).max()
    # One point, however often, has no extent but what rounding leaves.
    return np.asarray(centred / radius if radius > 1e-12 else centred * 0, dtype=np.float32)


def _xyz(content: bytes, name: str) -> list[list[float]]:
    rows = []
    for number, line in enumerate(_lines(content, name), start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if words:
            rows.append(_numbers(words, range(3), 3, f"{name}, line {number}"))
    return rows


def _ply(content: bytes, name: str) -> list[list[float]]:
    """Rows of x, y, z; the elements before the vertices take one line each, as the format says."""
    end = _END_HEADER.search(content)
    lines = _lines(content[: end.start()], name) if end else []
    if not end or lines[:1] == [] or lines[0].strip() != "ply":
        raise InputError(f"{name} is not a PLY file, or cut short in its header", "give an ASCII .ply, .xyz or .npy")
    form = next((line.split() for line in lines if line.split()[:1] == ["format"]), [])
    if form != ["format", "ascii", "1.0"]:
        raise InputError(
            f"{name} is not an ASCII PLY file: {' '.join(form)[:60] or 'no format'}",
            "save it as ASCII (Open3D: write_point_cloud(..., write_ascii=True)), or its points with numpy.save",
        )
    before, count, properties = _ply_vertices(lines[1:], name)
    columns = [properties.index(axis) for axis in _XYZ]
    body = _lines(content[end.end() :], name)
    rows = [line.split() for line in body if line.strip()][before : before + count]
    if len(rows) < count:
        raise InputError(f"{name} is cut short: {len(rows)} of {count} points are there", "copy it again")
    return [_numbers(row, columns, len(properties), f"{name}, vertex {i}") for i, row in enumerate(rows)]


def _ply_vertices(header: Sequence[str], name: str) -> tuple[int, int, list[str]]:
    """Lines before the vertices, their number, and the names of their properties."""
    before, count, properties = 0, -1, list[str]()
    inside = False
    for line in header:
        words = line.split()
        if words[:1] == ["element"] and len(words) == 3 and words[2].isdecimal():
            if len(words[2]) > _MOST_DIGITS:
                raise InputError(
                    f"{name} counts {words[2][:20]}… of {words[1][:60]}", "its header is damaged: copy it again"
                )
            inside = words[1] == "vertex"
            if inside:
                count = int(words[2])
            elif count < 0:
                before += int(words[2])
        elif words[:1] == ["property"] and inside:
            properties.append(words[-1] if words[1:2] != ["list"] else "")
    if count < 0 or not set(_XYZ) <= set(properties) or "" in properties:
        raise InputError(f"{name} has no vertices with x, y and z", "give points: element vertex, property float x …")
    return before, count, properties


def _lines(content: bytes, name: str) -> list[str]:
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not text", "give ASCII .ply or .xyz, or save the points with numpy.save"
        ) from error


def _numbers(words: Sequence[str], columns: Sequence[int], wanted: int, where: str) -> list[float]:
    try:
        if len(words) != wanted:
            raise ValueError
        return [float(words[column]) for column in columns]
    except ValueError as error:
        raise InputError(f"{where}: {' '.join(words)[:60]!r} is not {wanted} numbers", "give x y z a line") from error
