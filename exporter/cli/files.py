# SPDX-License-Identifier: Apache-2.0
"""What commands write: under a temporary name beside, renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perceiver_export.runtimes.errors import InputError


def check_file(path: Path) -> None:
    """Before a model runs for minutes: refuse a file that cannot be written anyway. Raises InputError."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: it is a directory, or its folder is not there", "give -o a file")


def check_new_directory(path: Path) -> None:
    """Refuse a directory that cannot be made: one that holds something, or whose parent is not there."""
    if (path.is_dir() and any(path.iterdir())) or (path.exists() and not path.is_dir()):
        raise InputError(f"{path} is there already", "give -o a directory that is not there yet, or is empty")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be made: its folder is not there", "give -o another directory")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, with the same ending; it becomes ``path``. Raises InputError."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}", "choose another file with -o"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary directory to fill; it becomes ``path``, which is absent or empty. Raises InputError."""
    path = path.resolve()  # a link to an empty directory stays one
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}", "choose another directory with -o"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, document: Any) -> None:
    """Write a document as indented JSON. Raises InputError."""
    import msgspec

    with new_file(path) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def text(path: str | os.PathLike[str]) -> str:
    """A path as text that JSON and terminals can take, whatever bytes its name has."""
    return os.fsencode(path).decode(errors="replace")
