# SPDX-License-Identifier: Apache-2.0
"""Open a bundle and check that its files have not changed since the export; read and write its report.json.

report.json contains measurements of the bundle. It changes later, so the manifest does not hash it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from perceiver_export.runtimes import files
from perceiver_export.runtimes.errors import BundleError, UsageError, check_choice, check_kind
from perceiver_export.runtimes.manifest import FileEntry, Manifest, Part, assumed_note, decode_manifest

if TYPE_CHECKING:
    import numpy.typing as npt

_log = logging.getLogger(__name__)

Verify = Literal["auto", "always", "never"]

GOLDEN = "golden.npz"
REPORT = "report.json"
_CHUNK = 1 << 20
MANIFEST_LIMIT = 16 << 20  # bytes; a manifest with 100,000 labels is 3 MB
_SOURCES = ("preset:", "deepmind:")  # prefixes of `export`'s sources
_AGAIN = "copy or export the bundle again"
NOT_SAVED = "copy the bundle to a writable directory"


class Bundle:
    """A bundle's directory and its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, task={self.manifest.task!r}, precision={self.manifest.precision!r})"

    @property
    def split(self) -> bool:
        """Whether encoder and decoder are separate parts."""
        return "encoder" in self.manifest.parts

    @property
    def num_bytes(self) -> int:
        """The size of the files that the manifest lists, without engines and reports."""
        return sum(entry.size for entry in self.manifest.files.values())

    def part(self, name: str | None = None) -> Part:
        """The part with that name; None selects the only part. Raises UsageError: no such part."""
        parts = self.manifest.parts
        if name is None and len(parts) == 1:
            return next(iter(parts.values()))
        if not isinstance(name, str) or name not in parts:
            raise UsageError(f"{self.path} has no part {name!r}", f"use one of {', '.join(parts)}")
        return parts[name]

    def file(self, name: str) -> Path:
        """The path of a file in the bundle. Raises BundleError: the name points outside the bundle."""
        return files.inside(self.path, name)


BundleLike: TypeAlias = str | os.PathLike[str] | Bundle  # a bundle, or the path of its directory


def open_bundle(path: BundleLike, verify: Verify = "auto") -> Bundle:
    """Read a bundle's manifest and check its files.

    ``auto`` hashes a file when it is first seen and after its size, times or inode change (the user's cache directory
    records them). ``always`` hashes every time. ``never`` checks only names and sizes; engines from `build` are then
    still checked as with ``auto``. A graph may read only weights that the manifest lists.

    Raises BundleError: not a bundle, or a file is missing, truncated or changed; UsageError: an unknown ``verify``, or
    not a path.
    """
    if isinstance(path, Bundle):
        path = path.path
    check_choice("verify", verify, get_args(Verify))
    check_kind("a bundle", path, (str, os.PathLike), "the path of its directory")
    directory = Path(path)
    bundle = Bundle(directory, read_manifest(directory))
    check_files(directory, bundle.manifest.files, verify)
    if note := assumed_note(bundle.manifest):
        _warn(directory, note)
    return bundle


@functools.cache
def _warn(directory: Path, note: str) -> None:
    """Warn once per process, because a bundle may be opened many times."""
    _log.warning("%s: %s", directory, note)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a bundle. The other files are not checked. Raises BundleError."""
    files.recover(directory)
    try:
        with files.reading(directory / "manifest.json", BundleError, _AGAIN):
            content = files.read_bytes(directory / "manifest.json", MANIFEST_LIMIT)
    except BundleError as error:
        if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise
        what = "is not a bundle: it has no manifest.json" if directory.exists() else "does not exist"
        hint = "give the directory that `perceiver-export export SOURCE -o BUNDLE` wrote"
        if (directory / "config.json").is_file() or str(directory).startswith(_SOURCES):
            source = shlex.quote(str(directory))
            hint = f"export it first, if it is a source: perceiver-export export {source} -o BUNDLE"
        raise BundleError(f"{directory} {what}", hint) from error
    return decode_manifest(content)


def golden_arrays(bundle: Bundle, part: str, kind: Literal["input", "output"]) -> dict[str, npt.NDArray[Any]]:
    """PyTorch's inputs or outputs for a part, from golden.npz; empty without that file. Raises BundleError."""
    if GOLDEN not in bundle.manifest.files:
        return {}
    from perceiver_export.runtimes.npz import Npz

    prefix = f"{part}/{kind}/" if len(bundle.manifest.parts) > 1 else f"{kind}/"
    with Npz(bundle.file(GOLDEN), BundleError) as golden:
        arrays = golden.read([name for name in golden.headers if name.startswith(prefix)])
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def check_files(directory: Path, listed: Mapping[str, FileEntry], verify: Verify, record: str = "the manifest") -> None:
    """Check a directory's files against the sizes and, depending on ``verify``, the hashes of a record.

    Raises BundleError: a file is missing, has changed, or reads weights that the record does not list.
    """
    import hashlib  # loads OpenSSL, a tenth of this package's import time

    known: dict[str, list[str | int]] = {}
    stamps: dict[str, list[str | int]] = {}
    key = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:32]
    cache = files.cache_directory() / "verified" / f"{key}.json"
    if verify == "auto":
        with contextlib.suppress(OSError, ValueError):  # without the cache all files are hashed
            files.private_cache()
            known = files.decode_json(files.read_bytes(cache), dict[str, list[str | int]])
    for name, entry in listed.items():
        stamp = _check_file(directory, name, entry, record)
        stamps[name] = stamp  # taken before hashing, so that the next check notices a change during it
        if verify != "never" and known.get(name) != stamp:
            with files.reading(name, BundleError):
                digest = sha256(directory / name)
            if digest != entry.sha256:
                raise BundleError(f"{name} was changed: its SHA-256 differs from the one in {record}", _AGAIN)
            if name.endswith(".onnx"):
                _check_weights(directory / name, name, listed, record)
    if verify == "auto" and stamps != known:
        files.write_cache(cache, files.encode_json(stamps))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in chunks. Raises OSError."""
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_file(directory: Path, name: str, entry: FileEntry, record: str) -> list[str | int]:
    """The file's stamp. Any change of its content changes one of these values, because st_ctime cannot be set back."""
    path = directory / name
    with files.reading(path, BundleError):
        found = path.is_file() and path.resolve().is_relative_to(directory.resolve())
        status = path.stat() if found else None
    if status is None:
        raise BundleError(f"{name} is missing from {directory}, or is a link that leaves it", _AGAIN)
    if status.st_size != entry.size:
        raise BundleError(f"{name} has {status.st_size} bytes, but {record} says {entry.size}", _AGAIN)
    times = status.st_mtime_ns, status.st_ctime_ns
    return [entry.sha256, status.st_size, status.st_ino, status.st_dev, *times]


def _check_weights(path: Path, name: str, listed: Mapping[str, FileEntry], record: str) -> None:
    """Raise BundleError if a graph reads weights that the record does not list, because they would not be hashed."""
    from perceiver_export.runtimes.external_data import external_files

    for one in sorted(external_files(path)):
        if os.path.normpath(os.path.join(os.path.dirname(name), one)) not in listed:
            raise BundleError(f"{name} reads weights from {one!r}, which {record} does not list", _AGAIN)


def read_report(bundle: Path) -> dict[str, Any]:
    """The report by section; empty if the file does not exist. Raises BundleError: it is damaged."""
    path = bundle / REPORT
    if not os.path.lexists(path):
        return {}
    return files.read_json(path, dict[str, Any], BundleError, "remove it, then run `bench --save` and `validate` again")


def change_report(bundle: Path, section: str, change: Callable[[Any], Any]) -> None:
    """Replace one section by ``change(section)``; a missing section is None. Concurrent writers wait for each other.

    Raises BundleError: the report is damaged or cannot be written.
    """
    path = bundle / REPORT
    with files.writing(path, BundleError, NOT_SAVED), files.locked(bundle / "manifest.json"):
        report = read_report(bundle)
        report[section] = change(report.get(section))
        files.write_bytes(path, files.encode_json(report), BundleError, NOT_SAVED)
