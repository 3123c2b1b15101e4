# SPDX-License-Identifier: Apache-2.0
"""Writing a bundle: whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from perceiver_export.runtimes.bundle import Bundle, read_manifest, sha256
from perceiver_export.runtimes.errors import BundleError, BundleExistsError, ExportError, UsageError
from perceiver_export.runtimes.manifest import FileEntry

_ELSEWHERE = "choose another place with -o"


@contextlib.contextmanager
def new_bundle(path: Path, overwrite: bool, elsewhere: str = _ELSEWHERE) -> Iterator[Path]:
    """A temporary directory beside ``path`` that becomes ``path`` when the block ends well, and vanishes otherwise.

    An existing bundle is replaced only with ``overwrite``, and only at the very end; anything else there is never
    touched. Of two writers at one place the first to finish wins. ``elsewhere`` is the hint where it cannot be written.

    Raises BundleExistsError; ExportError where the disk is full or the place cannot be written.
    """
    path = path.resolve()  # through a symbolic link, so that the link stays one
    refuse_existing(path, overwrite)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise _write_error(path, error, elsewhere) from error
    try:
        yield temporary
        for file in (temporary, *temporary.iterdir()):
            _sync(file)
        _move(temporary, path, overwrite)
    except OSError as error:
        raise _write_error(path, error, elsewhere) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_entries(directory: Path) -> dict[str, FileEntry]:
    """Size and hash of every file in ``directory``."""
    return {file.name: file_entry(file) for file in sorted(directory.iterdir())}


def file_entry(file: Path) -> FileEntry:
    """Size and hash of a file."""
    return FileEntry(sha256=sha256(file), size=file.stat().st_size)


def enclosing_bundle(path: Path) -> Path | None:
    """The bundle that ``path`` lies in, through symbolic links; None where it is in none, or is one itself."""
    for folder in path.resolve().parents:
        if os.path.isfile(folder / "manifest.json"):
            with contextlib.suppress(BundleError, OSError):  # another program's manifest.json
                read_manifest(folder)
                return folder
    return None


def refuse_place(path: Path, overwrite: bool, source: str | os.PathLike[str] | Bundle | None = None) -> None:
    """`refuse_existing`, and UsageError inside another bundle, or where ``source``, a bundle, would be lost."""
    place, bundle = path.resolve(), enclosing_bundle(path)
    if source is not None:
        read = (source.path if isinstance(source, Bundle) else Path(source)).resolve()
        if place == read or place in read.parents:
            raise UsageError(f"{path} would take the place of its own source {read}", "choose another -o")
    if bundle is not None:
        raise UsageError(f"{path} lies inside the bundle {bundle}", "choose a place outside of it with -o")
    refuse_existing(path, overwrite)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise BundleExistsError unless ``path`` is free, an empty directory, or a bundle that may be replaced."""
    try:
        if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
            return
        read_manifest(path)
    except OSError as error:
        raise _write_error(path, error) from error
    except BundleError as error:
        raise BundleExistsError(f"{path} exists and is not a bundle", "choose another place with -o") from error
    if not overwrite:
        raise BundleExistsError(
            f"there is already a bundle at {path}", "replace it with --overwrite, or choose another -o"
        )


def _move(temporary: Path, path: Path, overwrite: bool) -> None:
    """Rename into place. A bundle that is replaced is moved aside first, and back if that fails or is interrupted."""
    old = temporary.with_suffix(".old")
    try:
        if overwrite and (path / "manifest.json").is_file():
            path.rename(old)
        temporary.rename(path)  # replaces an empty directory, fails on any other
    except BaseException as error:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)  # another export is in the place, and replaces the old one as well
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT):
            raise BundleExistsError(
                f"another export wrote {path} in the meantime", "theirs is there; replace it with --overwrite"
            ) from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_error(path: Path, error: OSError, elsewhere: str = _ELSEWHERE) -> ExportError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ExportError(f"the disk is full, nothing was written to {path}", f"free some space, or {elsewhere}")
    if error.errno is None:  # numpy's own, where an array could not be written to its end
        return ExportError(f"{path} could not be written to its end: {error}", "is the disk full? free some space")
    return ExportError(f"{path} cannot be written: {error.strerror or error}", elsewhere)


def _sync(path: Path) -> None:
    """Onto the disk before the rename, so that a power cut leaves no empty files in a whole-looking bundle."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
