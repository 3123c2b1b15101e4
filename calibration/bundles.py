# SPDX-License-Identifier: Apache-2.0
"""Bundles and other directories that commands write: filled under a temporary name beside, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from perceiver_export.runtimes.bundle import Bundle, read_manifest, sha256
from perceiver_export.runtimes.certificates import FILE
from perceiver_export.runtimes.errors import (
    BundleError,
    BundleExistsError,
    ExportError,
    PerceiverExportError,
    UsageError,
    check_kind,
)
from perceiver_export.runtimes.files import check_writable, recover, replacing, writing
from perceiver_export.runtimes.manifest import FileEntry, encode_manifest

_ELSEWHERE = "choose another place with -o"


def absolute_place(out: str | os.PathLike[str]) -> Path:
    """``out`` with a name, even where it is "." or "bundle/". Raises UsageError: it is no path."""
    check_kind("output", out, (str, os.PathLike), "the path of a new directory")
    return Path(os.path.abspath(out))


@contextlib.contextmanager
def new_bundle(path: Path, overwrite: bool, elsewhere: str = _ELSEWHERE) -> Iterator[Path]:
    """A temporary directory beside ``path`` that becomes ``path`` when the block succeeds, and vanishes otherwise.

    An existing bundle is replaced only with ``overwrite``, and only at the very end; anything else there is never
    touched. Of two writers at one place the first to finish wins. ``elsewhere`` is the hint where it cannot be written.

    Raises BundleExistsError; ExportError where the disk is full or the place cannot be written.
    """
    refuse_existing(path, overwrite)
    with writing(path, ExportError, elsewhere):
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path, directory=True, overwrite=overwrite) as temporary:
                yield temporary
                if path.is_dir() and any(path.iterdir()) and not (path / "manifest.json").is_file():
                    raise FileExistsError  # it was a bundle, or nothing, when this began
        except FileExistsError as error:
            raise BundleExistsError(
                f"another export wrote {path} in the meantime", "theirs is there; replace it with --overwrite"
            ) from error


def file_entries(directory: Path) -> dict[str, FileEntry]:
    """Size and hash of every file in ``directory``."""
    return {file.name: file_entry(file) for file in sorted(directory.iterdir())}


def file_entry(file: Path) -> FileEntry:
    """Size and hash of a file."""
    return FileEntry(sha256=sha256(file), size=file.stat().st_size)


def identity(bundle: Bundle) -> str:
    """SHA-256 of a bundle with all files but calibration.json, to which certificates are added."""
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != FILE}
    return hashlib.sha256(encode_manifest(msgspec.structs.replace(bundle.manifest, files=files))).hexdigest()


def enclosing_bundle(path: Path) -> Path | None:
    """The bundle that ``path`` lies in, through symbolic links; None where it is in none, or is one itself."""
    for folder in path.resolve().parents:
        if os.path.isfile(folder / "manifest.json"):
            with contextlib.suppress(BundleError, OSError):  # another program's manifest.json
                read_manifest(folder)
                return folder
    return None


def refuse_place(path: Path, overwrite: bool, source: str | os.PathLike[str] | Bundle | None = None) -> None:
    """`refuse_existing` and `check_writable`; UsageError inside another bundle, or where ``source``, a bundle, would be
    lost.
    """
    place, bundle = path.resolve(), enclosing_bundle(path)
    if source is not None:
        read = (source.path if isinstance(source, Bundle) else Path(source)).resolve()
        if place == read or place in read.parents:
            raise UsageError(f"{path} would take the place of its own source {read}", "choose another -o")
    if bundle is not None:
        raise UsageError(f"{path} lies inside the bundle {bundle}", "choose a place outside of it with -o")
    check_writable(path, ExportError, _ELSEWHERE)
    refuse_existing(path, overwrite)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise BundleExistsError unless ``path`` is free, an empty directory, or a bundle that may be replaced."""
    recover(path)
    try:
        with writing(path, ExportError, _ELSEWHERE):
            if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
                return
        read_manifest(path)
    except BundleError as error:
        raise BundleExistsError(f"{path} exists and is not a bundle", "choose another place with -o") from error
    if not overwrite:
        raise BundleExistsError(
            f"there is already a bundle at {path}", "replace it with --overwrite, or choose another -o"
        )


def check_new_directory(path: Path, option: str, error: type[PerceiverExportError]) -> None:
    """Before a model runs for minutes: refuse a directory that holds something, or cannot be made.

    Raises ``error``, whose hint names the command's ``option``.
    """
    check_writable(path, error, f"give {option} another directory")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise error(f"{path} is there already", f"give {option} a directory that is not there yet, or is empty")
    if not path.absolute().parent.is_dir():
        raise error(f"{path} cannot be made: its folder is not there", f"give {option} another directory")


@contextlib.contextmanager
def new_directory(path: Path, option: str, error: type[PerceiverExportError]) -> Iterator[Path]:
    """A temporary directory that becomes ``path`` when the block succeeds, and vanishes otherwise.

    Raises what `check_new_directory` does; ``error`` where it cannot be written.
    """
    check_new_directory(path, option, error)
    hint = f"choose another directory with {option}"
    with writing(path, error, hint), replacing(path, directory=True, overwrite=False) as temporary:
        yield temporary
