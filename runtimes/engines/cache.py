# SPDX-License-Identifier: Apache-2.0
"""Compiled engines on disk: found by what engine.json says of them, published whole by one rename.

They lie in the bundle, `engines/TARGET/KEY/`; where the bundle cannot be written, in the user's cache directory under
the hash of the bundle's manifest. A lock keeps two builders of one target apart; it falls when its holder dies.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from perceiver_export.runtimes.bundle import Bundle, Verify, cache_directory, check_files, sha256
from perceiver_export.runtimes.engines.backend import Backend
from perceiver_export.runtimes.engines.records import RECORD, SCHEMA_VERSION, Identity, Record, mismatches, read_record
from perceiver_export.runtimes.errors import BuildError, BundleError, PerceiverExportError
from perceiver_export.runtimes.manifest import FileEntry

_PARTIAL = ".partial"
_LOCK = ".lock"


@dataclass(frozen=True)
class Candidate:
    """An engine that lies in a bundle or in the cache. ``problems``: why it is not for here and now; none if it is."""

    directory: Path
    record: Record
    problems: tuple[str, ...]


def candidates(bundle: Bundle, here: Identity, backend: Backend) -> tuple[Candidate, ...]:
    """Engines of that target and part, the newest first. Nothing but engine.json is read."""
    found = []
    for root in roots(bundle):
        for directory in _directories(root / here.target):
            record = read_record(directory)
            if record is not None and record.identity.target == here.target and record.identity.part == here.part:
                problems = mismatches(bundle, record.identity, here, backend)
                found.append((_modified(directory), Candidate(directory, record, problems)))
    found.sort(key=lambda pair: pair[0], reverse=True)
    return tuple(candidate for _, candidate in found)


def unreadable(bundle: Bundle, target: str) -> tuple[Path, ...]:
    """Directories of engines of that target whose engine.json cannot be read; a killed build leaves none."""
    directories = [directory for root in roots(bundle) for directory in _directories(root / target)]
    return tuple(directory for directory in directories if read_record(directory) is None)


def roots(bundle: Bundle) -> tuple[Path, Path]:
    """Where engines of this bundle may lie: in it, and in the user's cache directory."""
    import hashlib

    try:
        manifest = hashlib.sha256((bundle.path / "manifest.json").read_bytes()).hexdigest()[:32]
    except OSError as error:
        raise BundleError(f"{bundle.path}/manifest.json cannot be read: {error}", "check its permissions") from error
    return bundle.path / "engines", cache_directory() / "engines" / manifest


def check_engine(candidate: Candidate, verify: Verify) -> None:
    """Raise BundleError unless the engine's files are those that were built; hashed as a bundle's files are."""
    check_files(candidate.directory, candidate.record.files, verify, RECORD)


def publish(root: Path, identity: Identity, write: Callable[[Path], float]) -> Path:
    """Have ``write`` fill a temporary directory (it gives the seconds that it took), and rename that into place.

    The caller holds the lock. Raises BuildError: the disk is full, or the place cannot be written.
    """
    place = root / identity.target / identity.key
    temporary = place.with_name(f".{identity.key}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        temporary.mkdir(parents=True)
        seconds = write(temporary)
        files = {
            file.name: FileEntry(sha256=sha256(file), size=file.stat().st_size) for file in sorted(temporary.iterdir())
        }
        record = Record(schema_version=SCHEMA_VERSION, identity=identity, files=files, seconds=seconds)
        (temporary / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
        for file in (*temporary.iterdir(), temporary):
            _sync(file)
        if place.exists():  # damaged, or it would have been taken
            shutil.rmtree(place)
        temporary.rename(place)
    except OSError as error:
        raise write_error(root, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


@contextlib.contextmanager
def builders_lock(root: Path, target: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of one target's engines; ``waiting`` is called once where another process holds it.

    What a killed build left behind is removed. Raises BuildError where the place cannot be written.
    """
    directory = root / target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(root, error) from error
    try:
        _lock(descriptor, waiting)
        for left in directory.glob(f".*{_PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)  # and with it falls the lock


def write_error(place: Path, error: OSError) -> PerceiverExportError:
    """Ours for what the file system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return BuildError(f"the disk is full, no engine was written to {place}", "free some space and build again")
    return BuildError(f"no engine can be written to {place}: {error.strerror or error}", "check its permissions")


def writable_root(bundle: Bundle) -> Path:
    """The bundle's own place for engines, or the user's cache where the bundle cannot be written."""
    own, cached = roots(bundle)
    try:
        own.mkdir(exist_ok=True)
    except OSError:
        return cached
    return own if os.access(own, os.W_OK | os.X_OK) else cached


def _lock(descriptor: int, waiting: Callable[[], None]) -> None:
    if sys.platform == "win32":
        return  # the rename is whole without it; two builders only work twice
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # some network file systems have no locks
            raise


def _directories(place: Path) -> list[Path]:
    try:
        return [entry for entry in place.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []


def _modified(directory: Path) -> int:
    try:
        return (directory / RECORD).stat().st_mtime_ns
    except OSError:
        return 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
