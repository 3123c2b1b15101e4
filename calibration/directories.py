# SPDX-License-Identifier: Apache-2.0
"""Directories that commands write, complete or not at all: filled under a temporary name beside, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from perceiver_export.runtimes.errors import PerceiverExportError


def check_new_directory(path: Path, option: str, error: type[PerceiverExportError]) -> None:
    """Before a model runs for minutes: refuse a directory that holds something, or cannot be made.

    Raises ``error``, whose hint names the command's ``option``.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise error(f"{path} is there already", f"give {option} a directory that is not there yet, or is empty")
    if not path.absolute().parent.is_dir():
        raise error(f"{path} cannot be made: its folder is not there", f"give {option} another directory")


@contextlib.contextmanager
def new_directory(path: Path, option: str, error: type[PerceiverExportError]) -> Iterator[Path]:
    """A temporary directory that becomes ``path`` when the block ends well, and vanishes otherwise.

    Raises what `check_new_directory` does; ``error`` where it cannot be written.
    """
    check_new_directory(path, option, error)
    path = path.resolve()  # a link to an empty directory stays one
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    except OSError as cause:
        hint = f"choose another directory with {option}"
        raise error(f"{path} cannot be written: {cause.strerror or cause}", hint) from cause
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
