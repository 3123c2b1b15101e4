# SPDX-License-Identifier: Apache-2.0
"""Read DATA one raw sample at a time, from a path, ``module:function`` or an iterable, and read labels.

The form of a label depends on the kind of output: an index, a name, several of them, or values.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.runtimes.errors import DataError, PerceiverExportError, UsageError
from perceiver_export.runtimes.files import parsing, reading
from perceiver_export.runtimes.manifest import Manifest, TensorSpec, judged_output
from perceiver_export.runtimes.npz import Npz
from perceiver_export.runtimes.preprocessing import ImagePreprocessing, TextPreprocessing
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks.base import interface
from perceiver_export.runtimes.tasks.image_files import IMAGE_SUFFIXES

RANDOM = "random"
ITERABLE = "an iterable"  # the name of data without a path
LABELS = ("label", "labels")
Data = str | Path | Iterable[Mapping[str, Any]]
Row = tuple[str, Mapping[str, Any]]  # a sample's name; its arrays, image, text and label by name, as given

_SPECIAL, _BYTES = 6, 262  # the papers' tokens: special ones, and all with the bytes
_TEXT_LINE = 'write {"text": "…", "label": …} on each line, in UTF-8'


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """Let the block import modules from the current directory, as `python -m` does."""
    added = "" not in sys.path
    if added:
        sys.path.insert(0, "")
    try:
        yield
    finally:
        if added and "" in sys.path:  # the user's code may have removed it
            sys.path.remove("")


def find_function(spec: str) -> Callable[..., Any]:
    """Import ``module:function``. Raises UsageError if the import fails or the result is not callable."""
    module, _, name = spec.partition(":")
    if module.endswith(".py") and Path(module).is_file():
        raise UsageError(f"{spec} names a file, not a module", f"did you mean {module[:-3]}:{name}?")
    try:
        imported = importlib.import_module(module)
    except PerceiverExportError:
        raise
    except (Exception, SystemExit) as error:  # SystemExit would end the command with exit code 0
        hint = "give module:function as imported from this directory; guard scripts with `if __name__ == '__main__':`"
        raise UsageError(f"{spec} cannot be imported: {error!r}", hint) from error
    if not hasattr(imported, name):
        near = difflib.get_close_matches(name, vars(imported), n=1)
        hint = f"did you mean {module}:{near[0]}?" if near else f"name a function of {module}"
        raise UsageError(f"{module} has no function {name!r}", hint)
    function: Callable[..., Any] = getattr(imported, name)
    if not callable(function):
        raise UsageError(f"{spec} is of type {type(function).__name__}", "give a function")
    return function


def _dicts(items: Callable[[], Iterable[Any]], where: str) -> Iterator[Row]:
    """Samples from the user's code. Raises DataError if it fails, or yields anything but dicts with names as keys."""
    index = 0
    try:
        with current_directory_importable():  # the code may import modules while it yields samples
            for item in items():
                if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
                    raise TypeError(f"it yielded {type(item).__name__}, or keys that are not names")
                yield f"{where}[{index}]", item
                index += 1
    except UsageError as error:
        raise DataError(error.message, error.hint) from error
    except PerceiverExportError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"{where} failed at sample {index}: {error!r}", "yield {name: array} per sample") from error


@dataclass(frozen=True)
class Source:
    """``rows()`` yields the samples once. ``heads()``, for files, yields only names and labels, to check them first.

    ``count`` is the number of samples in a sized iterable. ``unlisted`` notes the images that labels.csv leaves out.
    """

    rows: Callable[[], Iterator[Row]]
    heads: Callable[[], Iterator[Row]] | None = None
    count: int | None = None
    unlisted: str = ""


def open_source(data: Data, manifest: Manifest) -> Source:
    """Find the form of DATA. Raises DataError, also later while reading."""
    if not isinstance(data, str | Path):
        items = data
        return Source(lambda: _dicts(lambda: items, "the data"), count=len(data) if isinstance(data, Sized) else None)
    path, text = Path(data), str(data)
    if text == RANDOM:
        return Source(lambda: _random(manifest))
    if ":" in text and not path.exists():
        return Source(lambda: _dicts(lambda: find_function(text)(), text))
    images = isinstance(manifest.preprocessing, ImagePreprocessing)
    with reading(path, DataError):
        archives = sorted(path.glob("*.npz")) if path.is_dir() else [path] * (path.suffix == ".npz" and path.is_file())
        if archives:
            return Source(lambda: _arrays(archives), lambda: _arrays(archives, heads=True))
        if images and path.is_dir():
            if not (path / "labels.csv").is_file():
                return _listed(list(_folders(path)))
            rows = list(_table(path))
            return _listed(rows, _unlisted(path, rows))
        if isinstance(manifest.preprocessing, TextPreprocessing) and path.suffix == ".jsonl" and path.is_file():
            return _listed(list(_lines(path)))
    folder = "a directory of images (labels.csv or class folders), " if images else ""
    names = ", ".join(spec.name for spec in interface(manifest)[0])
    raise DataError(
        f"{text} contains no data for {manifest.task}" if path.exists() else f"{text} does not exist",
        f"give {folder}an .npz of {names} (samples on the first axis), a .jsonl of texts, or module:function",
    )


def _listed(rows: Sequence[Row], unlisted: str = "") -> Source:
    return Source(lambda: iter(rows), lambda: iter(rows), unlisted=unlisted)


def _folders(path: Path) -> Iterator[Row]:
    """The images in the folder, without labels, and those in its subfolders, labeled with the subfolder's name."""
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for folder in (path, *classes):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file():
                label = {} if folder == path else {"label": folder.name}
                yield file.relative_to(path).as_posix(), {"image": file, **label}


def _table(path: Path) -> Iterator[Row]:
    table, hint = path / "labels.csv", "save it as UTF-8, comma-separated, with file,label as its first line"
    with parsing(str(table), "cannot be read", hint, DataError):
        content = table.read_bytes().decode("utf-8-sig", "surrogateescape")  # Excel writes a byte order mark
        rows = list(csv.DictReader(io.StringIO(content)))
    if not rows or not {"file", "label"} <= rows[0].keys():
        raise DataError(f"{table} has no columns `file` and `label`, or no rows", hint)
    for row in rows:
        name = row["file"] or ""
        if not (path / name).is_file():
            raise DataError(f"{table} lists {name!r}, which does not exist", "give paths relative to its folder")
        yield name, {"image": path / name, "label": row["label"] or ""}


def _unlisted(path: Path, rows: Sequence[Row]) -> str:
    images = [file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]
    left = sorted(set(images) - {values["image"] for _, values in rows})
    return f"{len(left):,} of {len(images):,} images have no row in labels.csv, first {left[0]}" if left else ""


def _lines(path: Path) -> Iterator[Row]:
    with reading(path, DataError, _TEXT_LINE):
        content = path.read_bytes()
    for number, line in enumerate(content.split(b"\n"), start=1):  # str.splitlines would also split at U+2028
        if line.strip():
            where = f"{path.name}:{number}"
            with parsing(where, "is not JSON", _TEXT_LINE, DataError):
                row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise DataError(f"{where} is not an object with a string `text`", _TEXT_LINE)
            yield where, row


def _arrays(paths: Sequence[Path], heads: bool = False) -> Iterator[Row]:
    """The rows of all archives, one in memory at a time. With ``heads``, only labels, and None for other arrays."""
    for path in paths:
        with Npz(path, DataError) as archive:
            counts = {header.shape[:1] or (0,) for header in archive.headers.values()}
            if len(counts) != 1:
                found = ", ".join(f"{name} {list(header.shape)}" for name, header in archive.headers.items())
                raise DataError(f"{path} contains {found or 'no arrays'}", "give every array one row per sample")
            rows: Iterable[tuple[int, Mapping[str, Any]]] = archive.rows()
            if heads:
                names: dict[str, Any] = dict.fromkeys(archive.headers)
                labels = archive.read([name for name in LABELS if name in names])
                (count,) = counts.pop()
                rows = ((row, names | {name: array[row] for name, array in labels.items()}) for row in range(count))
            for index, row in rows:
                yield f"{path.name}[{index}]", row


def _random(manifest: Manifest) -> Iterator[Row]:
    """Normally distributed numbers, and random tokens of the model's vocabulary, without masks."""
    generator, index = np.random.default_rng(0), 0
    while True:
        values = {}
        for spec in interface(manifest)[0]:
            shape = largest(spec)
            if spec.dtype == "float32":
                values[spec.name] = generator.normal(size=shape).astype(np.float32)
            elif not is_mask(spec.name):
                count = _BYTES if spec.values is None else spec.values[1] + 1
                first = _SPECIAL if count > _SPECIAL else 0
                values[spec.name] = generator.integers(first, count, shape).astype(spec.dtype)
        yield f"{RANDOM}[{index}]", values
        index += 1


def largest(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of one sample, with dynamic sizes at their maximum."""
    return tuple(spec.limits(axis)[1] for axis in range(1, len(spec.shape)))


def is_mask(name: str) -> bool:
    """Whether an input with that name is a mask of another input."""
    return name.endswith("_mask")


class Labels:
    """Reads the labels of one model's data. ``notes`` has the assumptions made if label names are numbers."""

    def __init__(self, manifest: Manifest) -> None:
        name, self.kind = judged_output(manifest) or ("", "none")
        shape = next((spec.shape[1:] for spec in interface(manifest)[1] if spec.name == name), ()) or (1,)
        self._shape = tuple(size for size in shape if isinstance(size, int))
        self.names = manifest.labels or tuple(map(str, range(self._shape[-1] if isinstance(shape[-1], int) else 0)))
        self._indices: dict[str, list[int]] = {}
        for index, label in enumerate(self.names):
            self._indices.setdefault(label, []).append(index)
        # If names are numbers such as "1" and "0", a text is always a name, never an index.
        self._numbers = any(_whole(label) not in (None, index) for index, label in enumerate(self.names))
        self.notes: dict[str, str] = {}

    def read(self, label: Any, where: str) -> Array:
        """The target: int64 (), float32 (labels,) of zeros and ones, or float32 (values,). Raises DataError."""
        if isinstance(label, (np.ndarray, np.generic)) and label.ndim == 0:
            label = label.item()
        if self.kind == "single-label":
            return np.asarray(self._index(label, where), np.int64)
        return self._vector(label, where) if self.kind == "multi-label" else self._values(label, where)

    def seen(self, target: Array) -> list[str]:
        """The names of the labels in a target, with the index if two labels share a name."""
        if self.kind not in ("single-label", "multi-label"):
            return []
        indices = np.flatnonzero(target).tolist() if target.ndim else [int(target)]
        return [self.names[i] + (f" ({i})" if len(self._indices[self.names[i]]) > 1 else "") for i in indices]

    def _index(self, label: Any, where: str) -> int:
        """The index of one label. A text is a name, or else an index (unless names are numbers)."""
        text = isinstance(label, str)
        named = self._indices.get(label, []) if text else []
        if len(named) > 1:
            raise DataError(f"{where}: labels {named} share the name {label!r}", "give the index instead")
        index = named[0] if named else None if text and self._numbers else _whole(label)
        if index is None or not 0 <= index < len(self.names):
            hint = f"give an index from 0 to {len(self.names) - 1}, or a name: {', '.join(self.names[:12])}"
            raise DataError(f"{where}: {label!r} is not a label of this model", hint)
        if self._numbers:
            kind, taken = ("text", "a name") if text else ("an integer", "an index")
            note = f"label names of this model are numbers, so {kind} was read as {taken}"
            self.notes.setdefault(kind, f"{note}: {label!r} is label {index}, named {self.names[index]!r}")
        return index

    def _vector(self, label: Any, where: str) -> Array:
        """Zeros and ones (labels,)."""
        array = isinstance(label, np.ndarray)
        if isinstance(label, str):
            label = [label] if label in self._indices else [one.strip() for one in label.split(";") if one.strip()]
        items = label.tolist() if array else list(label) if isinstance(label, Sequence | set | frozenset) else [label]
        if len(items) == len(self.names) and all(not isinstance(one, str) and one in (0, 1) for one in items):
            if len(items) < 3 and not array and all(type(one) is int for one in items):
                said = f"{where}: {items} is ambiguous: indices, or zeros and ones for each label"
                raise DataError(said, "give names, true and false, or an array of zeros and ones")
            return np.asarray(items, np.float32)
        target = np.zeros(len(self.names), np.float32)
        target[[self._index(one, where) for one in items]] = 1
        return target

    def _values(self, label: Any, where: str) -> Array:
        """Numbers (values,)."""
        try:
            with np.errstate(over="ignore"):
                values = np.asarray(label.split(";") if isinstance(label, str) else label, np.float32)
            if (values.ndim > 1 and values.shape != self._shape) or not np.isfinite(values).all():
                raise ValueError(f"shape {list(values.shape)}, or not finite")
            return values.reshape(self._shape)
        except (TypeError, ValueError) as error:
            hint = f"give {int(np.prod(self._shape))} finite numbers per sample"
            raise DataError(f"{where}: the label {label!r} is invalid: {error}", hint) from error


def _whole(label: Any) -> int | None:
    """A label as a whole number, even if it is a text of digits; None for anything else."""
    try:
        index = int(label)
        return index if isinstance(label, str) or index == label else None
    except (TypeError, ValueError, OverflowError):
        return None
