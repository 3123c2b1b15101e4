# SPDX-License-Identifier: Apache-2.0
"""What commands write: under a temporary name beside, renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from perceiver_export.runtimes.errors import InputError, UsageError

_NO_DATA = (".html", ".json", ".md", ".xml")  # what commands write, and read as nobody's samples


def check_file(path: Path) -> None:
    """Before a model runs for minutes: refuse a file that cannot be written anyway. Raises InputError."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(
            f"{path} cannot be written: it is a directory, or its folder is not there",
            "name a file in a folder that is there",
        )


def check_output(path: Path, read: Iterable[str | os.PathLike[str] | None], ending: str | None = None) -> None:
    """Refuse a file or directory to write that what is ``read`` would be lost to, or another ``ending``.

    What is read are inputs as they were typed: files, directories of samples, text, or none. Raises UsageError.
    """
    from perceiver_export.calibration.write import enclosing_bundle

    for one in read:
        if one is None or not os.path.exists(one):  # text, and module:function
            continue
        place, source = path.resolve(), Path(one).resolve()
        sample = path.is_file() and source in place.parents and path.suffix.lower() not in _NO_DATA
        if place == source or sample:
            raise UsageError(f"{path} is read by this command, and would be overwritten", "write to another place")
    if ending is not None and path.suffix.lower() != ending:
        named = path / f"NAME{ending}" if path.is_dir() else path.with_suffix(ending)
        raise UsageError(f"{path} does not end in {ending}", f"name a file that does: {named}")
    bundle = enclosing_bundle(path)
    if bundle is not None:
        raise UsageError(f"{path} lies inside the bundle {bundle}", "write to a place outside of it")


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
