# SPDX-License-Identifier: Apache-2.0
"""Writing a bundle: whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perceiver_export.runtimes.bundle import sha256
from perceiver_export.runtimes.errors import BundleExistsError, ExportError
from perceiver_export.runtimes.manifest import FileEntry


@contextmanager
def new_bundle(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside ``path`` that becomes ``path`` when the block ends well, and vanishes otherwise.

    An existing bundle is replaced only with ``overwrite``, and only at the very end; anything else there is never
    touched. Of two writers at one place the first to finish wins.

    Raises BundleExistsError; ExportError where the disk is full or the place cannot be written.
    """
    refuse_existing(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        yield temporary
        for file in (temporary, *temporary.iterdir()):
            _sync(file)
        temporary.chmod(0o777 & ~_umask())
        _move(temporary, path, overwrite)
        _sync(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_entries(directory: Path) -> dict[str, FileEntry]:
    """Size and hash of every file in ``directory``."""
    return {file.name: FileEntry(sha256=sha256(file), size=file.stat().st_size) for file in sorted(directory.iterdir())}


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise BundleExistsError unless ``path`` is free, or a bundle that may be replaced."""
    if not os.path.lexists(path):
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not (path / "manifest.json").is_file():
        raise BundleExistsError(f"{path} exists and is not a bundle", "choose another place with -o")
    if not overwrite:
        raise BundleExistsError(
            f"there is already a bundle at {path}", "replace it with --overwrite, or choose another -o"
        )


def _move(temporary: Path, path: Path, overwrite: bool) -> None:
    if overwrite and (path / "manifest.json").is_file():
        old = temporary.with_suffix(".old")
        path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old)
        return
    try:
        temporary.rename(path)  # replaces an empty directory, fails on any other
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise BundleExistsError(
                f"another export wrote {path} in the meantime", "theirs is there; replace it with --overwrite"
            ) from error
        raise


def _write_error(path: Path, error: OSError) -> ExportError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExportError(f"the disk is full, nothing was written to {path}", "free some space, or choose another -o")
    return ExportError(f"{path} cannot be written: {error.strerror or error}", "choose another place with -o")


def _sync(path: Path) -> None:
    """Onto the disk before the rename, so that a power cut leaves no empty files in a whole-looking bundle."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
