# SPDX-License-Identifier: Apache-2.0
"""DATA: from a path or ``module:function`` to a stream of samples, one at a time.

| DATA | what it holds |
|---|---|
| directory with labels.csv | pictures; the csv has the columns ``file`` and ``label`` (an index or a label's name) |
| directory of class folders | pictures, in folders named by an index or a label's name |
| directory of pictures | pictures without labels |
| file.npz, or a directory of them | ``image``: uint8 (N, H, W[, 3]) or the model's float32; ``labels`` if any |
| module:function | called; gives an iterable of ``{"image": array[, "label": index]}`` |
"""

from __future__ import annotations

import contextlib
import csv
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.calibration.labels import label_index
from perceiver_export.calibration.user_code import call_function
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.pictures import PICTURE_FILES
from perceiver_export.runtimes.runtime import Array


@dataclass(frozen=True)
class Sample:
    """One picture, as a path, uint8 pixels or a preprocessed float32 input; its label's index; where it came from."""

    image: Path | Array
    label: int | None
    name: str


@dataclass(frozen=True)
class Data:
    """Samples that can be gone through once, and how many there are where that is known."""

    samples: Iterable[Sample]
    count: int | None


def open_data(spec: str | Path, labels: tuple[str, ...]) -> Data:
    """Open DATA for a classifier with these labels. Raises DataError; reading may raise it later too."""
    path, text = Path(spec), str(spec)
    try:
        if path.is_dir():
            return _open_directory(path, labels)
        if path.suffix == ".npz" and path.exists():
            return _open_archives([path], labels)
    except PermissionError as error:
        raise DataError(f"{text} cannot be read: {error.strerror}", "check its permissions") from error
    if ":" in text and not path.exists():
        return Data(_from_function(text, labels), None)
    raise DataError(
        f"{text} is not data that can be read" if path.exists() else f"{text} does not exist",
        "give a directory of pictures (labels.csv or class folders), an .npz, or module:function",
    )


def _open_directory(path: Path, labels: tuple[str, ...]) -> Data:
    archives = sorted(path.glob("*.npz"))
    if archives:
        return _open_archives(archives, labels)
    if (path / "labels.csv").is_file():
        samples = list(_from_csv(path, labels))
    else:
        samples = [Sample(file, None, file.name) for file in sorted(path.iterdir()) if _is_picture(file)]
        for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
            files = [file for file in sorted(folder.iterdir()) if _is_picture(file)]
            if files:
                label = label_index(folder.name, labels, f"folder {folder}")
                samples += [Sample(file, label, f"{folder.name}/{file.name}") for file in files]
    if not samples:
        raise DataError(f"{path} holds no pictures and no .npz", f"pictures end in {', '.join(sorted(PICTURE_FILES))}")
    return Data(samples, len(samples))


def _from_csv(path: Path, labels: tuple[str, ...]) -> Iterator[Sample]:
    for row in _rows(path / "labels.csv"):
        name = row["file"] or ""
        if not (path / name).is_file():
            raise DataError(
                f"{path}/labels.csv names {name!r}, which does not exist", "paths start at the csv's folder"
            )
        yield Sample(path / name, label_index(row["label"] or "", labels, f"labels.csv, file {name}"), name)


def _rows(path: Path) -> list[dict[str, str | None]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
            reader = csv.DictReader(file)
            names, rows = set(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}", "save it as UTF-8, comma-separated") from error
    if not {"file", "label"} <= names:
        raise DataError(f"{path} has no columns `file` and `label`", "its first line is: file,label")
    return rows


def _open_archives(paths: list[Path], labels: tuple[str, ...]) -> Data:
    counts = []
    for path in paths:
        with _archive(path) as arrays:
            counts.append(_check_archive(path, arrays, labels))
    if not sum(counts):
        raise DataError(f"{paths[0]} holds no samples", "give at least one")
    return Data(_from_archives(paths), sum(counts))


def _check_archive(path: Path, arrays: Mapping[str, Array], labels: tuple[str, ...]) -> int:
    """How many samples there are, after a look at names and labels."""
    names = set(arrays)
    if "image" not in names or names - {"image", "labels"}:
        raise DataError(
            f"{path} holds {', '.join(sorted(names)) or 'nothing'}", "it must hold `image`, and may hold `labels`"
        )
    images = _member(path, arrays, "image")
    if images.dtype not in (np.uint8, np.float32) or images.ndim not in (3, 4):
        raise DataError(
            f"`image` in {path} is {images.dtype} with shape {list(images.shape)}",
            "give uint8 (N, H, W) or (N, H, W, 3), or float32 (N, 3, H, W) as the model takes it",
        )
    if "labels" in names:
        found = _member(path, arrays, "labels")
        if found.shape != (len(images),) or found.dtype.kind not in "iu":
            raise DataError(f"`labels` in {path} does not fit {len(images)} pictures", "give one integer a picture")
        for index in np.unique(found):
            label_index(index, labels, str(path))
    return len(images)


def _from_archives(paths: list[Path]) -> Iterator[Sample]:
    for path in paths:
        with _archive(path) as arrays:
            images = _member(path, arrays, "image")
            labels = _member(path, arrays, "labels") if "labels" in set(arrays) else None
        for index, image in enumerate(images):
            yield Sample(image, None if labels is None else int(labels[index]), f"{path.name}[{index}]")


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[Mapping[str, Array]]:
    with contextlib.ExitStack() as stack:
        try:
            arrays = np.load(stack.enter_context(path.open("rb")), allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not an npz that can be read", "it is damaged or cut: copy it again") from error
        if isinstance(arrays, np.ndarray):
            raise DataError(f"{path} is an npy, not an npz", "save it with numpy.savez(path, image=…)")
        yield stack.enter_context(arrays)


def _member(path: Path, arrays: Mapping[str, Array], name: str) -> Array:
    try:
        return arrays[name]
    except Exception as error:
        # zlib, zipfile and numpy each raise their own for a damaged or pickled member.
        raise DataError(
            f"{name!r} in {path} cannot be read: {error}", "it is damaged, or holds Python objects"
        ) from error


def read_archives(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Array]]]:
    """All arrays of each archive, one archive at a time. Raises DataError."""
    for path in paths:
        with _archive(path) as arrays:
            yield path, {name: _member(path, arrays, name) for name in arrays}


def is_of_kind(found: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Whether numbers are of the kind that a model takes: floats of any width, or integers and booleans."""
    return found.kind in ("f" if wanted.kind == "f" else "iub")


def converted(array: Array, dtype: np.dtype[Any], what: str) -> Array:
    """Numbers of that kind as the model takes them. Raises DataError: NaN, infinite, or too large for ``dtype``."""
    with np.errstate(over="ignore"):
        given: Array = np.ascontiguousarray(array, dtype)
    if dtype.kind == "f" and not np.isfinite(given).all():
        raise DataError(f"{what} holds NaN or infinite values as {dtype}", "mend the data")
    if dtype.kind == "i" and not np.array_equal(given, array):
        raise DataError(f"{what} holds numbers that do not fit {dtype}", "mend the data")
    return given


def _from_function(spec: str, labels: tuple[str, ...]) -> Iterator[Sample]:
    for index, item in enumerate(call_function(spec)):
        if not isinstance(item, Mapping) or "image" not in item or not isinstance(item["image"], np.ndarray):
            raise DataError(f"{spec} gave something else than {{'image': array}}", "give dicts of numpy arrays")
        label = item.get("label", item.get("labels"))
        name = f"{spec.partition(':')[2]}[{index}]"
        yield Sample(item["image"], None if label is None else label_index(label, labels, name), name)


def _is_picture(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in PICTURE_FILES
