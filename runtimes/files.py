# SPDX-License-Identifier: Apache-2.0
"""Read files from untrusted sources, and write files that are complete or absent.

Only regular files are read, without following links, and up to a size limit. A file or directory is written under a
temporary name in the same directory, then moved into place by one rename, or by one exchange if the path exists. The
writer locks the temporary file, and the system drops the lock when the writer dies. So the next writer can distinguish
the leftovers of a dead writer from the files of a live one, and removes the leftovers.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from perceiver_export.runtimes.errors import BundleError, InputError, PerceiverExportError

logging.getLogger("perceiver_export").addHandler(logging.NullHandler())
_log = logging.getLogger(__name__)

_T = TypeVar("_T")
JSON_LIMIT = 64 << 20  # bytes; a manifest with 100,000 labels is 3 MB
_DEEPEST = 100  # levels of nested JSON; this package's files have 10
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STRING = re.compile(rb'"[^"]*"[^][{}"]*')  # and what follows, once escaped quotes are removed
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_PARTIAL, _NEW, _OLD = ".partial", ".new", ".old"
_SECONDS = 60.0  # the writer of an older `.new` file died before it could lock the file
FIRST_USE = threading.Lock()  # held while a library sets up state that two threads must not set up at once
os.register_at_fork(after_in_child=FIRST_USE._at_fork_reinit)  # type: ignore[attr-defined]
_decoder = functools.cache(msgspec.json.Decoder)
_AT_CWD, _EXCHANGE = -100, 2  # renameat2's AT_FDCWD and RENAME_EXCHANGE


def is_safe_name(name: str) -> bool:
    """Whether a name from a file may become a path: letters, digits, ``_ . -``, and ``/`` between components."""
    return len(name) <= 200 and _NAME.fullmatch(name) is not None and ".." not in name


def inside(directory: Path, name: str) -> Path:
    """``directory / name`` for a name from a file. Raises BundleError: it is not a safe name."""
    if not is_safe_name(name):
        raise BundleError(f"{name!r} is not a safe file name in {directory}", "do not trust this bundle")
    return directory / name


def read_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises OSError: missing, a link, a device, a pipe, or larger.
    """
    if "\0" in os.fspath(path):
        raise OSError(errno.EINVAL, "its name contains a null byte")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than the limit of {limit:,}")
        return file.read(limit)


def decoder(kind: Any) -> Any:
    """msgspec's JSON decoder for ``kind``. msgspec 0.22 crashes if two threads first use a type at the same time."""
    with FIRST_USE:
        return _decoder(kind)


def converted(value: object, kind: type[_T]) -> _T:
    """Convert lists and dicts to ``kind``. Raises msgspec.ValidationError."""
    decoder(kind)
    return msgspec.convert(value, kind)


def decode_json(content: bytes, kind: type[_T]) -> _T:
    """Decode JSON to ``kind``. Raises ValueError: not JSON, of another type, or nested too deeply."""
    if content.count(b"[") + content.count(b"{") > _DEEPEST:
        depth, unescaped = 0, content.replace(rb"\\", b"").replace(rb"\"", b"")
        for bracket in _STRING.sub(b"", unescaped).translate(None, _NOT_BRACKETS):
            depth += 1 if bracket in b"[{" else -1
            if depth > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    try:
        decoded: _T = decoder(kind).decode(content)
        return decoded
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def read_json(
    path: Path,
    kind: type[_T],
    error: type[PerceiverExportError] = BundleError,
    hint: str = "copy the bundle again",
    limit: int = JSON_LIMIT,
) -> _T:
    """A JSON file from an untrusted source. Raises ``error``: missing, unreadable, too large, or of another type."""
    try:
        with reading(path, error, hint):
            return decode_json(read_bytes(path, limit), kind)
    except ValueError as cause:
        raise error(f"{path} cannot be read: {cause}", hint) from cause


def encode_json(document: object, indent: int = 2) -> bytes:
    """Indented JSON with a trailing newline; on one line if ``indent`` is 0.

    Bytes of file names that are not valid UTF-8 become U+FFFD.
    """
    try:
        encoded = msgspec.json.encode(document)
    except UnicodeEncodeError:
        import json

        encoded = readable(json.dumps(msgspec.to_builtins(document), ensure_ascii=False)).encode()
    return msgspec.json.format(encoded, indent=indent) + b"\n"


def readable(path: str | os.PathLike[str]) -> str:
    """A path as text for JSON and terminals. Bytes that are not valid UTF-8 become U+FFFD."""
    return os.fsencode(path).decode(errors="replace")


@contextlib.contextmanager
def reading(
    path: Path | str, error: type[PerceiverExportError] = InputError, hint: str = "check the path and its permissions"
) -> Iterator[None]:
    """Turn OSError into ``error``."""
    try:
        yield
    except FileNotFoundError as cause:
        raise error(f"{path} does not exist", hint) from cause
    except OSError as cause:
        reason = "it is a link" if cause.errno == errno.ELOOP else cause.strerror or cause
        raise error(f"{path} cannot be read: {reason}", hint) from cause


@contextlib.contextmanager
def parsing(name: str, problem: str, hint: str, error: type[PerceiverExportError] = InputError) -> Iterator[None]:
    """Turn whatever a library raises for a damaged file into ``error``, with one line that has the name and problem."""
    try:
        yield
    except PerceiverExportError:
        raise
    except BaseException as cause:
        if not isinstance(cause, Exception) and type(cause).__name__ != "PanicException":  # from Rust libraries
            raise
        # Libraries raise OSError for damaged files too, without a number.
        if isinstance(cause, (FileNotFoundError, PermissionError)) or (isinstance(cause, OSError) and cause.errno):
            with reading(name, error):
                raise
        said = " ".join(str(cause).replace(f" {name!r}", "").split())[:200] or type(cause).__name__
        raise error(f"{name} {problem}: {said}", hint) from cause


@contextlib.contextmanager
def writing(
    path: Path | str, error: type[PerceiverExportError] = InputError, hint: str = "choose another place"
) -> Iterator[None]:
    """Turn OSError into ``error``, with its own message for a full disk."""
    try:
        yield
    except OSError as cause:
        if is_full(cause):
            raise error(f"the disk is full: {path} was not written", "free some space and run again") from cause
        raise error(f"{path} cannot be written: {cause.strerror or cause}", hint) from cause


def is_full(error: OSError) -> bool:
    """Whether the disk or a quota is full."""
    # numpy raises an OSError without a number if it cannot write a whole array.
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return error.errno in full or (error.errno is None and str(error).endswith(" written"))


def write_bytes(
    path: Path, content: bytes, error: type[PerceiverExportError] = InputError, hint: str = "choose another place"
) -> None:
    """Write the whole file or nothing. Raises ``error``."""
    with writing(path, error, hint), replacing(path) as temporary:
        temporary.write_bytes(content)


def check_writable(
    path: Path, error: type[PerceiverExportError] = InputError, hint: str = "choose another place"
) -> None:
    """Raise ``error`` if ``path`` cannot be created or replaced. Call it before long work."""
    folder = next(parent for parent in path.resolve().parents if os.path.exists(parent))
    effective = os.access in os.supports_effective_ids
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
        raise error(f"{path} cannot be written: {folder} is not a writable directory", hint)


@contextlib.contextmanager
def replacing(path: Path, *, directory: bool = False, overwrite: bool = True) -> Iterator[Path]:
    """A temporary file or directory that becomes ``path`` if the block succeeds, and is removed if it fails.

    The temporary file has the same suffix. A link at ``path`` stays, and its target is replaced. Without ``overwrite``
    only an empty directory is replaced. Raises OSError; FileExistsError: another process has written ``path``.
    """
    path = path.resolve()
    recover(path)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.stem}.{os.urandom(6).hex()}{_PARTIAL}{path.suffix}")
    new = temporary.with_name(temporary.name.replace(_PARTIAL, _NEW))
    try:
        if directory:
            new.mkdir()
        else:
            os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        with locked(new):
            new.rename(temporary)  # after locking, because an unlocked `.partial` counts as a leftover
            yield temporary
            sync(temporary)
            _put(temporary, path, directory, overwrite)
            sync(path.parent, recursive=False)
    finally:
        for left in (new, temporary):
            _remove(left)


def exchange(first: Path, second: Path) -> None:
    """Swap two directories by one renameat2 if the file system supports it, else by three renames. Raises OSError.

    If the process is killed between the renames, ``second`` is left under a name that `recover` finds.
    """
    if _exchanged(first, second):
        return
    aside = second.with_name(f".{second.name}.{os.urandom(6).hex()}{_OLD}")
    with locked(second):
        second.rename(aside)
        try:
            first.rename(second)
        except BaseException:
            aside.rename(second)
            raise
        aside.rename(first)


def recover(path: Path) -> None:
    """If a writer was killed during an exchange, put back the directory that it moved aside, and log it."""
    if os.path.lexists(path):
        return
    for aside in sorted(_siblings(path, _OLD)):
        with contextlib.suppress(OSError), locked(aside, wait=False):  # a live writer holds its lock
            aside.rename(path)
            _log.warning("%s was restored, because the command that was replacing it was killed", path)
            return


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the system's lock on a file or directory. The system drops it when the process dies.

    If another process holds the lock, ``waiting`` is called once; without ``wait``, BlockingIOError is raised instead.
    On a file system without locks nothing is locked.
    """
    import fcntl

    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            # NFS gives EBADF for an exclusive lock on a file that is open for reading.
            if not wait or error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
                raise
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough if a child was forked meanwhile
        os.close(descriptor)


def cache_directory() -> Path:
    """The directory for this package's own files: $XDG_CACHE_HOME or ~/.cache, then perceiver-export."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(os.path.expanduser("~/.cache"))) / "perceiver-export"


def private_cache() -> Path:
    """Create `cache_directory`, accessible only to this user. Raises OSError: another user owns it, or no access."""
    directory = cache_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"{directory} belongs to another user")
    if stat.S_IMODE(status.st_mode) & 0o077:
        directory.chmod(0o700)
    return directory


def write_cache(path: Path, content: bytes) -> None:
    """Write a whole file below `cache_directory`, or nothing. A full or read-only home is not an error."""
    with contextlib.suppress(OSError):
        private_cache()
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def _put(temporary: Path, path: Path, directory: bool, overwrite: bool) -> None:
    if not directory:
        os.replace(temporary, path)
    elif overwrite and path.is_dir() and any(path.iterdir()):
        exchange(temporary, path)
    else:
        try:
            temporary.rename(path)  # replaces an empty directory, fails on anything else
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, "another process wrote it in the meantime") from error
            raise


def _exchanged(first: Path, second: Path) -> bool:
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library older than glibc 2.28
        return False
    if renameat2(_AT_CWD, os.fsencode(first), _AT_CWD, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # an old kernel, or a file system without exchange
        return False
    raise OSError(code, os.strerror(code), str(second))


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of ``path`` whose writers died."""
    for ending in (_PARTIAL, _NEW, _OLD):
        for left in _siblings(path, ending):
            with contextlib.suppress(OSError), locked(left, wait=False):
                # A new file may not be locked yet.
                if ending != _NEW or time.time() - left.stat().st_mtime > _SECONDS:
                    _remove(left)


def _siblings(path: Path, ending: str) -> list[Path]:
    """The temporary files of ``path``: ``.STEM.HEX.partial.SUFFIX``, or ``.NAME.HEX.old``."""
    stem, suffix = (path.name, "") if ending == _OLD else (path.stem, path.suffix)
    pattern = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{12}}{re.escape(ending + suffix)}")
    try:
        return [path.parent / name for name in os.listdir(path.parent) if pattern.fullmatch(name)]
    except OSError:
        return []


def _remove(path: Path) -> None:
    """Remove a file, or a directory with its contents, without following links."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            import shutil

            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def sync(path: Path, recursive: bool = True) -> None:
    """Flush to the disk, so that a power failure leaves no empty file that looks complete."""
    if recursive and path.is_dir():
        for entry in path.iterdir():
            sync(entry)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
