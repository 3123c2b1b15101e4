# SPDX-License-Identifier: Apache-2.0
"""Opening a bundle and checking that its files are those that were exported."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import msgspec

from perceiver_export.runtimes.errors import BundleError, UsageError
from perceiver_export.runtimes.manifest import FileEntry, Manifest, Part, decode_manifest

Verify = Literal["auto", "always", "never"]

_CHUNK = 1 << 20
_SOURCES = ("preset:", "deepmind:", "krasserm:", "lucidrains:")  # how `export`'s sources begin that are no directories


class Bundle:
    """A bundle's directory and its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, task={self.manifest.task!r}, precision={self.manifest.precision!r})"

    @property
    def split(self) -> bool:
        """Whether encoder and decoder are apart."""
        return "encoder" in self.manifest.parts

    def part(self, name: str | None = None) -> Part:
        """The part of that name; None means the only one. Raises UsageError."""
        parts = self.manifest.parts
        if name is None and len(parts) == 1:
            return next(iter(parts.values()))
        if name not in parts:
            raise UsageError(f"{self.path} has no part {name!r}", f"its parts: {', '.join(parts)}")
        return parts[name]

    def file(self, name: str) -> Path:
        """Where the file of that name lies. It is in the manifest, so it is inside the bundle."""
        return self.path / name


def open_bundle(path: str | os.PathLike[str] | Bundle, verify: Verify = "auto") -> Bundle:
    """Read a bundle's manifest and check its files.

    ``auto`` hashes a file when it is first seen and after any change of its size or time (a stamp in the user's cache
    directory remembers); ``always`` hashes every time; ``never`` looks only at names and sizes.

    Raises BundleError: no bundle there, a file missing, cut, or changed; UsageError: an unknown ``verify``.
    """
    if isinstance(path, Bundle):
        path = path.path
    if verify not in get_args(Verify):
        raise UsageError(f"verify is {verify!r}", f"it is one of {', '.join(get_args(Verify))}")
    directory = Path(path)
    bundle = Bundle(directory, read_manifest(directory))
    check_files(directory, bundle.manifest.files, verify)
    return bundle


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a bundle, without a look at the other files. Raises BundleError."""
    try:
        content = (directory / "manifest.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "is not a bundle: it has no manifest.json" if directory.exists() else "does not exist"
        is_source = (directory / "config.json").is_file() or str(directory).startswith(_SOURCES)
        raise BundleError(
            f"{directory} {what}",
            f"it looks like a SOURCE: perceiver-export export {directory} -o BUNDLE"
            if is_source
            else "a bundle is the directory that `perceiver-export export SOURCE -o BUNDLE` writes",
        ) from error
    except OSError as error:
        raise BundleError(
            f"{directory}/manifest.json cannot be read: {error.strerror}", "check its permissions"
        ) from error
    return decode_manifest(content)


def check_files(directory: Path, files: Mapping[str, FileEntry], verify: Verify, record: str = "the manifest") -> None:
    """Check files of a directory against the sizes and, as ``verify`` says, hashes of a record. Raises BundleError."""
    stamps = _Stamps(directory) if verify == "auto" else None
    for name, entry in files.items():
        _check_file(directory, name, entry, record)
        if verify != "never" and not (stamps and stamps.holds(name, entry)):
            _check_hash(directory / name, name, entry, record)
            if stamps:
                stamps.add(name, entry)
    if stamps:
        stamps.save()


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    import hashlib  # with its OpenSSL a tenth of this package's import time

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cache_directory() -> Path:
    """Where this package may leave files of its own: $XDG_CACHE_HOME or ~/.cache, then perceiver-export."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(os.path.expanduser("~/.cache"))) / "perceiver-export"


def _check_file(directory: Path, name: str, entry: FileEntry, record: str) -> None:
    path = directory / name
    try:
        inside = path.is_file() and path.resolve().is_relative_to(directory.resolve())
        size = path.stat().st_size if inside else 0
    except OSError as error:
        raise BundleError(f"{name} cannot be read: {error.strerror}", "check its permissions") from error
    if not inside:
        raise BundleError(f"{name} is missing from {directory}, or a link out of it", "copy or export the bundle again")
    if size != entry.size:
        raise BundleError(
            f"{name} has {size} bytes, {record} says {entry.size}",
            "the file was cut or changed: copy the bundle again",
        )


def _check_hash(path: Path, name: str, entry: FileEntry, record: str) -> None:
    try:
        found = sha256(path)
    except OSError as error:
        raise BundleError(f"{name} cannot be read: {error.strerror}", "check its permissions") from error
    if found != entry.sha256:
        raise BundleError(
            f"{name} is not the file that was exported: its sha256 differs from {record}'s",
            "the file was damaged or changed: copy or export the bundle again",
        )


class _Stamps:
    """Which files of a bundle were hashed and found right, by size, time and inode. Losing it costs only time."""

    def __init__(self, directory: Path) -> None:
        import hashlib

        self._directory = directory
        key = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:32]
        self._path = cache_directory() / "verified" / f"{key}.json"
        try:
            self._stamps = msgspec.json.decode(self._path.read_bytes(), type=dict[str, list[str | int]])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            self._stamps = {}
        self._changed = False

    def _stamp(self, name: str, entry: FileEntry) -> list[str | int]:
        status = (self._directory / name).stat()
        return [entry.sha256, status.st_size, status.st_mtime_ns, status.st_ino]

    def holds(self, name: str, entry: FileEntry) -> bool:
        return self._stamps.get(name) == self._stamp(name, entry)

    def add(self, name: str, entry: FileEntry) -> None:
        self._stamps[name] = self._stamp(name, entry)
        self._changed = True

    def save(self) -> None:
        if not self._changed:
            return
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(msgspec.json.encode(self._stamps))
            temporary.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):  # a read-only or full home: the next load hashes again
                temporary.unlink()
