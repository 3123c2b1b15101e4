# SPDX-License-Identifier: Apache-2.0
"""What commands write: under a temporary name beside, renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perceiver_export.runtimes.errors import InputError


def check_file(path: Path) -> None:
    """Before a model runs for minutes: refuse a file that cannot be written anyway. Raises InputError."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(
            f"{path} cannot be written: it is a directory, or its folder is not there",
            "name a file in a folder that is there",
        )


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, with the same ending; it becomes ``path``. Raises InputError."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}", "choose another file") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, document: Any) -> None:
    """Write a document as indented JSON. Raises InputError."""
    import msgspec

    with new_file(path) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def text(path: str | os.PathLike[str]) -> str:
    """A path as text that JSON and terminals can take, whatever bytes its name has."""
    return os.fsencode(path).decode(errors="replace")
