# SPDX-License-Identifier: Apache-2.0
"""Read .npz and .npy files from untrusted sources. Sizes come from the headers, before anything is decompressed.

An .npz is a zip archive of .npy files, and a few MB may expand to many GB. Arrays are read whole only up to a limit,
otherwise one row of the first axis at a time. Nothing in them is executed.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError, PerceiverExportError
from perceiver_export.runtimes.files import parsing

LIMIT = 2 << 30  # bytes read at once, for all arrays of a file together
_LONGEST_HEADER = 10_000  # numpy's own limit
_KINDS = "biufUS"  # booleans, numbers, and strings, which may be labels
_SAVE = "write it with numpy.savez, with arrays of numbers only"


class Header(NamedTuple):
    """An array's dtype, shape and memory order, and from them its size in memory."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    by_columns: bool

    @property
    def size(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_size(self) -> int:
        """Bytes in memory to read one row; an array stored by columns is read whole."""
        return self.size if self.by_columns or not self.shape else math.prod(self.shape[1:]) * self.dtype.itemsize


class Npz:
    """The arrays of an .npz file, by name. Use it as a context manager.

    Raises ``error`` here and while reading: the file is missing or damaged, more than ``limit`` bytes would be read at
    once, or an array contains Python objects or records.
    """

    def __init__(
        self, path: str | os.PathLike[str], error: type[PerceiverExportError] = InputError, limit: int = LIMIT
    ) -> None:
        self._path, self._error, self._limit = Path(path), error, limit
        self.headers: dict[str, Header] = {}
        with self._parsing(), contextlib.ExitStack() as stack:
            if self._path.exists() and not self._path.is_file():
                raise ValueError("it is not a regular file")
            self._archive = stack.enter_context(zipfile.ZipFile(self._path))
            self._members = {name.removesuffix(".npy"): name for name in self._archive.namelist()}
            for short, name in self._members.items():
                with self._archive.open(name) as file:
                    self.headers[short] = read_header(file)
            stack.pop_all()

    def __enter__(self) -> Npz:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def read(self, names: Collection[str] | None = None) -> dict[str, npt.NDArray[Any]]:
        """Whole arrays by name, by default all of them."""
        wanted = list(self.headers) if names is None else names
        self._check(sum(self.headers[name].size for name in wanted), "read at once")
        arrays = {}
        with self._parsing():
            for name in wanted:
                with self._archive.open(self._members[name]) as file:
                    arrays[name] = _body(file, read_header(file))
        return arrays

    def rows(self) -> Iterator[tuple[int, dict[str, npt.NDArray[Any]]]]:
        """The index and the arrays of each row. Every array has one row per sample."""
        self._check(sum(header.row_size for header in self.headers.values()), "read for one sample")
        count = min((header.shape[0] if header.shape else 0 for header in self.headers.values()), default=0)
        with contextlib.ExitStack() as stack:
            with self._parsing():
                readers = {
                    name: _rows(stack.enter_context(self._archive.open(member)))
                    for name, member in self._members.items()
                }
            for index in range(count):
                with self._parsing():
                    row = {name: next(reader) for name, reader in readers.items()}
                yield index, row

    def _check(self, size: int, how: str) -> None:
        if size > self._limit:
            raise self._error(
                f"{self._path} would take {size / 2**30:.1f} GiB {how}, more than {self._limit / 2**30:.1f} GiB",
                "split it into smaller files",
            )

    def _parsing(self) -> contextlib.AbstractContextManager[None]:
        return parsing(str(self._path), "is not a readable .npz file", _SAVE, self._error)


def read_npz(
    path: str | os.PathLike[str], error: type[PerceiverExportError] = InputError
) -> dict[str, npt.NDArray[Any]]:
    """All arrays of an .npz file by name. Raises ``error``: see `Npz`."""
    with Npz(path, error) as archive:
        return archive.read()


def read_header(file: IO[bytes]) -> Header:
    """The header of a .npy file, read up to the start of the data. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it has the unsupported .npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(file, max_header_size=_LONGEST_HEADER)
    if dtype.kind not in _KINDS or dtype.itemsize == 0 or min(shape, default=0) < 0:
        raise ValueError(f"it contains {dtype} of shape {list(shape)}, not an array of numbers")
    return Header(dtype, shape, by_columns and len(shape) > 1)


def _rows(file: IO[bytes]) -> Iterator[npt.NDArray[Any]]:
    header = read_header(file)
    if header.by_columns:
        yield from _body(file, header)
        return
    row = Header(header.dtype, header.shape[1:], False)
    for _ in range(header.shape[0]):
        yield _body(file, row)


def _body(file: IO[bytes], header: Header) -> npt.NDArray[Any]:
    content = bytearray()
    while len(content) < header.size:
        piece = file.read(min(header.size - len(content), 1 << 24))
        if not piece:
            raise ValueError("it is truncated")
        content += piece
    flat = np.frombuffer(content, header.dtype)
    return flat.reshape(header.shape[::-1]).T if header.by_columns else flat.reshape(header.shape)


def write_npz(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write an .npz file whose bytes depend only on the arrays. Unlike `numpy.savez`, it accepts any array name."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))  # numpy would write the current time
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)
