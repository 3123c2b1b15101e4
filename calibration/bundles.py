# SPDX-License-Identifier: Apache-2.0
"""Bundles and other directories that commands write under a temporary name and then rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from perceiver_export.runtimes.bundle import Bundle, BundleLike, read_manifest, sha256
from perceiver_export.runtimes.certificates import FILE
from perceiver_export.runtimes.errors import (
    BundleError,
    BundleExistsError,
    ExportError,
    PerceiverExportError,
    UsageError,
    check_kind,
)
from perceiver_export.runtimes.files import check_writable, encode_json, recover, replacing, writing
from perceiver_export.runtimes.manifest import FileEntry, Manifest, encode_manifest

_ELSEWHERE = "choose another path with -o"


def absolute_place(out: str | os.PathLike[str]) -> Path:
    """``out`` as an absolute path, so that "." and "bundle/" have a name too. Raises UsageError if it is not a path."""
    check_kind("output", out, (str, os.PathLike), "the path of a new directory")
    return Path(os.path.abspath(out))


@contextlib.contextmanager
def new_bundle(path: Path, overwrite: bool, elsewhere: str = _ELSEWHERE) -> Iterator[Path]:
    """A temporary directory that becomes ``path`` if the block succeeds, and is removed if it fails.

    An existing bundle is replaced only with ``overwrite``, and only at the very end. Anything else at ``path`` is never
    changed. If two processes write the same path, the first to finish wins. ``elsewhere`` is the hint for a path that
    cannot be written.

    Raises BundleExistsError, and ExportError if the disk is full or the path cannot be written.
    """
    refuse_existing(path, overwrite)
    with writing(path, ExportError, elsewhere):
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path, directory=True, overwrite=overwrite) as temporary:
                yield temporary
                if path.is_dir() and any(path.iterdir()) and not (path / "manifest.json").is_file():
                    raise FileExistsError  # it was a bundle or empty at the start
        except FileExistsError as error:
            hint = "replace its result with --overwrite"
            raise BundleExistsError(f"another process wrote {path} in the meantime", hint) from error


def file_entries(directory: Path) -> dict[str, FileEntry]:
    """Size and hash of every file in ``directory``."""
    return {file.name: file_entry(file) for file in sorted(directory.iterdir())}


def file_entry(file: Path) -> FileEntry:
    """Size and hash of a file."""
    return FileEntry(sha256=sha256(file), size=file.stat().st_size)


def write_record(directory: Path, manifest: Manifest, record: object) -> None:
    """Write calibration.json, and the manifest with its hash."""
    (directory / FILE).write_bytes(encode_json(record))
    manifest = msgspec.structs.replace(manifest, files={**manifest.files, FILE: file_entry(directory / FILE)})
    (directory / "manifest.json").write_bytes(encode_manifest(manifest))


def identity(bundle: Bundle) -> str:
    """SHA-256 of a bundle with all files but calibration.json, to which certificates are added."""
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != FILE}
    return hashlib.sha256(encode_manifest(msgspec.structs.replace(bundle.manifest, files=files))).hexdigest()


def enclosing_bundle(path: Path) -> Path | None:
    """The bundle that contains ``path``, with symbolic links resolved; None if no bundle does."""
    for folder in path.resolve().parents:
        if os.path.isfile(folder / "manifest.json"):
            with contextlib.suppress(BundleError, OSError):  # another program's manifest.json
                read_manifest(folder)
                return folder
    return None


def refuse_place(path: Path, overwrite: bool, source: BundleLike | None = None) -> None:
    """`refuse_existing` and `check_writable`. Raises UsageError if ``path`` is inside another bundle, or writing it
    would overwrite the bundle ``source``.
    """
    place, bundle = path.resolve(), enclosing_bundle(path)
    if source is not None:
        read = (source.path if isinstance(source, Bundle) else Path(source)).resolve()
        if place == read or place in read.parents:
            raise UsageError(f"{path} would overwrite its own source {read}", "choose another -o")
    if bundle is not None:
        raise UsageError(f"{path} is inside the bundle {bundle}", "choose a path outside it with -o")
    check_writable(path, ExportError, _ELSEWHERE)
    refuse_existing(path, overwrite)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise BundleExistsError unless ``path`` is missing, an empty directory, or a bundle that may be replaced."""
    recover(path)
    try:
        with writing(path, ExportError, _ELSEWHERE):
            if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
                return
        read_manifest(path)
    except BundleError as error:
        raise BundleExistsError(f"{path} exists and is not a bundle", _ELSEWHERE) from error
    if not overwrite:
        raise BundleExistsError(f"the bundle {path} already exists", "choose another -o, or replace it: --overwrite")


def check_new_directory(path: Path, option: str, error: type[PerceiverExportError]) -> None:
    """Raise ``error`` if a directory is not empty or cannot be created. Call it before long work.

    The hint names the command's ``option``.
    """
    check_writable(path, error, f"give {option} another directory")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise error(f"{path} already exists", f"give {option} a new or empty directory")
    if not path.absolute().parent.is_dir():
        raise error(f"{path} cannot be created: its parent directory is missing", f"give {option} another directory")


@contextlib.contextmanager
def new_directory(path: Path, option: str, error: type[PerceiverExportError]) -> Iterator[Path]:
    """A temporary directory that becomes ``path`` if the block succeeds, and is removed if it fails.

    Raises ``error`` as `check_new_directory` does, and if the directory cannot be written.
    """
    check_new_directory(path, option, error)
    hint = f"choose another directory with {option}"
    with writing(path, error, hint), replacing(path, directory=True, overwrite=False) as temporary:
        yield temporary


def copy_tree(source: Path, target: Path) -> None:
    """Copy the contents of a directory into another, by hard links if the file system supports them.

    Hidden files (leftovers of killed writers) are skipped. Raises BundleError for a link, device or pipe, and OSError.
    """
    import shutil

    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            raise BundleError(f"{entry} is a link or not a regular file", "copy the file itself into the bundle")
        if entry.is_dir():
            place.mkdir()
            copy_tree(entry, place)
            continue
        try:
            os.link(entry, place, follow_symlinks=False)
        except OSError:
            shutil.copyfile(entry, place, follow_symlinks=False)
