# SPDX-License-Identifier: Apache-2.0
"""Point cloud classification: point clouds in, labels or values out.

Point clouds are read from .npy, .xyz text and .ply files, reduced to a fixed number of points and scaled into the cube
[-1, 1].
"""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.files import parsing, reading
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.preprocessing import PointsPreprocessing
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks import base
from perceiver_export.runtimes.tasks.base import Classifier, LoadPart, Prediction, Shape
from perceiver_export.runtimes.tasks.image_files import as_array
from perceiver_export.runtimes.tasks.images import load_npy

# float64, because clouds may be far from the origin.
Points = npt.NDArray[np.float64]

POINT_FILES = (".npy", ".xyz", ".ply")
# It must be a line of its own, because comments may contain the word.
_END_HEADER = re.compile(rb"(?:\r\n|\r|\n)[ \t]*end_header[ \t]*(?:\r\n|\r|\n|\Z)")
_ASCII = "ascii 1.0"
_ORDERS = {_ASCII: "", "binary_little_endian 1.0": "<", "binary_big_endian 1.0": ">"}
_CODES = ["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"]
_TYPES = {
    **dict(zip(["char", "uchar", "short", "ushort", "int", "uint", "float", "double"], _CODES, strict=True)),
    **dict(zip(["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"], _CODES, strict=True)),
}


def read_points(path: str | os.PathLike[str]) -> Points:
    """The points of a file, float64 (n, 3).

    - .npy: an array (n, 3).
    - .xyz: one point per line, three numbers separated by blanks or commas; ``#`` starts a comment.
    - .ply, ASCII or binary: x, y and z of the element ``vertex``; other properties are ignored.

    Raises InputError: no such file, another format, not three numbers per point, no points, or NaN or infinity.
    """
    name, ending = os.fspath(path), Path(path).suffix.lower()
    if ending == ".npy":
        return as_points(load_npy(path), name)
    if ending not in POINT_FILES:
        raise InputError(f"{name} is not a readable point cloud", f"give {', '.join(POINT_FILES)}")
    hints = {".xyz": "give x y z on each line", ".ply": "give vertices with float x, y and z, and no lists before them"}
    with reading(name):
        content = Path(path).read_bytes()
    with parsing(name, "cannot be read", hints[ending]):
        points = _ply(content) if ending == ".ply" else _table(content.decode("utf-8-sig").replace(",", " "), 3)
    return as_points(points, name)


def as_points(cloud: npt.ArrayLike, name: str = "the point cloud") -> Points:
    """Numbers (n, 3) as float64 (n, 3). Raises InputError: another shape, no points, NaN or infinity."""
    array = as_array(cloud)
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != 3:
        hint = "give numbers (n, 3): x, y, z; drop other columns with points[:, :3]"
        raise InputError(f"{name} is {array.dtype} of shape {list(array.shape)}", hint)
    if not len(array):
        raise InputError(f"{name} contains no points", "give one or more")
    points = array.astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(wrong):
        found = f"{len(wrong)} of {len(points)} points of {name} are not finite"
        hint = "remove them: points[numpy.isfinite(points).all(axis=1)]"
        raise InputError(f"{found}, such as point {wrong[0]}: {array[wrong[0]].tolist()}", hint)
    return points


def subsample(points: Points, count: int) -> Points:
    """At most ``count`` points: all of them, or every (n/count)-th. The choice is deterministic."""
    return points if len(points) <= count else points[np.arange(count) * len(points) // count]


def into_unit_cube(points: Points) -> npt.NDArray[np.float32]:
    """Points (n, 3) moved so that their mean is 0, and scaled so that the largest coordinate is 1 or -1."""
    extent = np.abs(points).max() or 1.0
    # Dividing first keeps the sum of large numbers from overflowing.
    centred = points / extent - (points / extent).mean(axis=0)
    radius = np.abs(centred).max()
    # If all points are equal, the radius is only rounding error.
    return np.asarray(centred / radius if radius > 1e-12 else centred * 0, dtype=np.float32)


def _ply(content: bytes) -> Points:
    """x, y, z of each vertex. Raises ValueError."""
    end = _END_HEADER.search(content)
    lines = [line.split() for line in content[: end.start()].decode("utf-8-sig").splitlines()] if end else []
    if not end or lines[:1] != [["ply"]]:
        raise ValueError("it is not a PLY file, or its header is truncated")
    form = next((" ".join(line[1:]) for line in lines if line[:1] == ["format"]), "missing")
    if form not in _ORDERS:
        raise ValueError(f"its format is {form[:60]}, not ascii or binary 1.0")
    body, before = content[end.end() :], 0  # rows, or bytes, before the vertices
    for name, count, properties in _elements(lines):
        if name == "vertex":
            break
        before += count * (1 if form == _ASCII else _row(name, properties, "<").itemsize)
    else:
        properties = {}
    if not {"x", "y", "z"} <= properties.keys() or "list" in properties.values():
        raise ValueError("it has no vertices with x, y and z, or they have a list")
    if form == _ASCII:
        rows = [line for line in body.decode().splitlines() if line.strip()][before : before + count]
        found = len(rows)
    else:
        row = _row("vertex", properties, _ORDERS[form])
        found = max(0, len(body) - before) // row.itemsize
    if found < count:
        raise ValueError(f"it is truncated: it contains {found} of {count} points")
    if form == _ASCII:
        return _table("\n".join(rows), len(properties))[:, [list(properties).index(axis) for axis in "xyz"]]
    table = np.frombuffer(body, row, count, before)
    return np.stack([table[axis].astype(np.float64) for axis in "xyz"], axis=1)


def _elements(header: list[list[str]]) -> Iterator[tuple[str, int, dict[str, str]]]:
    """Name, count and properties (name to type) of each element of a PLY header. Raises ValueError."""
    for place, words in enumerate(header):
        if words[:1] == ["element"]:
            if len(words) != 3 or not re.fullmatch("[0-9]{1,18}", words[2]):
                raise ValueError(f"its element {' '.join(words[1:])[:60]!r} is not a name and a count")
            own = itertools.takewhile(lambda line: line[:1] != ["element"], header[place + 1 :])
            named = [(line[-1], line[1]) for line in own if line[:1] == ["property"] and len(line) > 2]
            if len(dict(named)) < len(named):
                raise ValueError(f"its element {words[1][:60]!r} has two properties with the same name")
            yield words[1], int(words[2]), dict(named)


def _row(element: str, properties: Mapping[str, str], order: str) -> np.dtype[Any]:
    """One row of an element in a binary file. Raises ValueError: a list, or an unknown type."""
    for name, kind in properties.items():
        if kind not in _TYPES:
            raise ValueError(f"the property {name} of {element} has the type {kind}, which has no fixed size")
    return np.dtype([(name, order + _TYPES[kind]) for name, kind in properties.items()])


def _table(text: str, columns: int) -> Points:
    """Rows of numbers. Raises ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an empty file, for which the caller raises an error
        found = np.loadtxt(text.splitlines(), np.float64, ndmin=2)
    if len(found) and found.shape[1] != columns:
        raise ValueError(f"it has {found.shape[1]} numbers per line, not {columns}")
    return found if found.size else np.empty((0, columns))


CloudLike = str | os.PathLike[str] | npt.NDArray[Any] | Sequence[Sequence[float]]


class PointCloudClassification(Classifier):
    """``classify(cloud)`` -> the most probable labels, or the values of a regression model.

    A cloud is a .npy, .xyz or .ply file, or numbers (n, 3). If it has more points than the model takes, every
    (n/num_points)-th is used; if it has fewer, it is padded with points that are masked (``points_mask``). The points
    are moved to mean 0 and scaled into the cube [-1, 1].
    """

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        self.num_points = base.steps_of(manifest, PointsPreprocessing).num_points
        self._masked = _masked(manifest)

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a point cloud classifier."""
        steps = base.steps_of(manifest, PointsPreprocessing)
        inputs: dict[str, Shape] = {"points": (steps.num_points, 3)}
        if _masked(manifest):
            inputs["points_mask"] = (steps.num_points,)
        base.check_interface(manifest, inputs, {base.answering(manifest)[0]: (None,)})

    def __call__(self, cloud: CloudLike, top: int = 5) -> list[Prediction]:
        """The ``top`` labels, most probable first, or all values.

        Raises InputError: not a point cloud; UsageError: top below 1.
        """
        base.check_top(top)
        return self.answers(self.logits([cloud])[0], top)

    def preprocess(self, cloud: CloudLike) -> dict[str, Array]:
        """The model's inputs for one cloud: ``points`` (1, num_points, 3), and ``points_mask`` if the model has it."""
        points = read_points(cloud) if isinstance(cloud, (str, os.PathLike)) else as_points(cloud)
        missing = self.num_points - len(points)
        if missing > 0 and not self._masked:
            found = f"the cloud has {len(points)} points, but a model without a mask needs {self.num_points}"
            raise InputError(found, "sample more points from the surface")
        rows = into_unit_cube(subsample(points, self.num_points))
        feeds: dict[str, Array] = {"points": np.pad(rows, ((0, max(missing, 0)), (0, 0)))[None]}
        if self._masked:
            feeds["points_mask"] = (np.arange(self.num_points) < len(rows)).astype(np.int32)[None]
        return feeds

    def logits(self, clouds: CloudLike | Sequence[CloudLike]) -> npt.NDArray[np.float32]:
        """Logits or values (clouds, labels) of one cloud or several, run in batches of the bundle's batch size."""
        samples = [self.preprocess(cloud) for cloud in base.as_list(clouds, "point clouds", _is_cloud)]
        return self.run_inputs({name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]})


def _is_cloud(given: Any) -> bool:
    if isinstance(given, np.ndarray):
        return given.ndim == 2
    rows = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    return isinstance(given, (str, os.PathLike)) or (rows and as_array(given[0]).ndim == 1)


def _masked(manifest: Manifest) -> bool:
    return any(spec.name == "points_mask" for spec in base.interface(manifest)[0])
