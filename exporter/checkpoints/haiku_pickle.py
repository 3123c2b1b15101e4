# SPDX-License-Identifier: Apache-2.0
"""Haiku's pickles, read without jax, haiku, or anything in the file being executed.

A pickle is a program: it names Python functions and calls them. The unpickler here answers a dozen names (numpy's
array, dtype and their helpers, Haiku's mappings, jax's array) with stand-ins of its own and refuses every other. Even
numpy's own functions never see what the file says: a stand-in checks it and makes a plain array of numbers.

DeepMind's released files hold ``FlatMapping`` of ``FlatMapping`` of arrays; those of ImageNet a dict of two such,
``params`` and ``state``. Any pickle protocol, and the module paths of numpy 1 and 2, are read.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from perceiver_export.exporter.checkpoints.haiku_stand_ins import (
    DO_NOT_TRUST,
    NAMES,
    RefusedError,
    StandIn,
    StoredArray,
)
from perceiver_export.runtimes.errors import CheckpointError

Array = npt.NDArray[Any]

_TOO_MUCH = "holds more than it has bytes: the same ones again and again"
_SLACK = 1 << 20  # bytes
_SAVE_NUMPY = "save plain arrays: jax.tree_util.tree_map(lambda x: numpy.asarray(x, numpy.float32), params)"
_COPY_AGAIN = "give a pickle of Haiku parameters as DeepMind released them; if it is one, copy it again"
# Extensions come from a table of the process, past find_class; persistent ids from outside the file.
_REFUSED_OPCODES = frozenset(("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"))
_MEMO_OPCODES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZh": "bzip2", b"\xfd7z": "xz", b"\x28\xb5": "zstd"}


@dataclass(frozen=True, eq=False)
class HaikuCheckpoint:
    """Arrays by ``module/path/parameter``, as Haiku names them; ``state`` is empty where nothing was averaged.

    Linear ``w`` are (in, out), convolution ``w`` are HWIO. float32, or float64 and integers where the file has them.
    """

    params: dict[str, Array]
    state: dict[str, Array]


def read_haiku(path: Path) -> HaikuCheckpoint:
    """Parameters and state of a Haiku pickle: bare parameters, or a mapping of ``params`` and ``state``.

    Raises CheckpointError: no such file, no pickle, a damaged one, one that names anything but arrays and mappings,
    or one with NaN or infinite values.
    """
    content = _content(path)
    tree, most = _unpickle(path, content), len(content) + _SLACK
    if not isinstance(tree, dict) or not tree:
        raise CheckpointError(f"{path} holds no mapping of parameters", _COPY_AGAIN)
    if not _is_wrapped(tree):
        return HaikuCheckpoint(_flat(path, tree, most), {})
    left_over = sorted(name for name, _ in _items(path, tree) if name not in ("params", "state"))
    if left_over:
        named = ", ".join(left_over[:5]) + (" …" if len(left_over) > 5 else "")
        raise CheckpointError(f"{path} holds {named} beside params and state", "save a dict of params and state only")
    return HaikuCheckpoint(_flat(path, tree["params"], most), _flat(path, tree.get("state") or {}, most))


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "give a pickle file") from error
    if not content:
        raise CheckpointError(f"{path} is empty", "copy the checkpoint again")
    for magic, kind in _COMPRESSED.items():
        if content.startswith(magic):
            raise CheckpointError(f"{path} is a {kind} file, not a pickle", "unpack it, then give the pickle inside")
    return content


def _unpickle(path: Path, content: bytes) -> object:
    try:
        _check_opcodes(content)
        return _Unpickler(content).load()
    except RefusedError as error:
        raise CheckpointError(f"{path} {error}; refused, nothing was executed", error.hint) from error
    except Exception as error:  # a damaged pickle makes Python raise anything
        raise CheckpointError(f"{path} is not a readable pickle: it is cut, damaged or none", _COPY_AGAIN) from error


def _check_opcodes(content: bytes) -> None:
    """Refuse what an unpickler does without asking `find_class`. Raises ValueError where opcodes cannot be told."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _REFUSED_OPCODES:
            raise RefusedError("refers to objects outside the file")
        if opcode.name in _MEMO_OPCODES and argument is not None and argument > len(content):
            raise RefusedError(f"asks for a memo of {argument} entries")  # gigabytes, for a file of a few bytes


class _Unpickler(pickle.Unpickler):
    """Builds dicts, tuples, lists, strings, numbers, and what `NAMES` lists."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._left = len(content) + _SLACK

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in NAMES:
            full = f"{module}.{name}"
            shown = full if full.isprintable() and len(full) <= 100 else ascii(full[:100])
            hint = _SAVE_NUMPY if module.startswith(("jax", "ml_dtypes")) else DO_NOT_TRUST
            raise RefusedError(f"names the class {shown}, which is no array and no mapping", hint)
        if name == "encode":
            return StandIn(self._encode)
        return NAMES[module, name]

    def persistent_load(self, pid: object, /) -> NoReturn:
        raise RefusedError("refers to objects outside the file")

    def _encode(self, text: object, encoding: object) -> bytes:
        """Protocol 2 has no bytes of its own. Each text is encoded once, whatever a file makes of its memo."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise RefusedError("encodes text")
        self._left -= len(text)
        if self._left < 0:
            raise RefusedError(_TOO_MUCH)
        return text.encode("latin1")


def _is_wrapped(tree: dict[object, object]) -> bool:
    params = tree.get("params")
    return isinstance(params, dict) and all(isinstance(module, dict) for module in params.values())


def _flat(path: Path, tree: object, most: int) -> dict[str, Array]:
    """{module: {name: array}} as {module/name: array}, with ``most`` bytes of arrays and names in all.

    Raises CheckpointError: other things in it, more of them, or NaN.
    """
    flat: dict[str, Array] = {}
    plain: dict[int, Array] = {}  # one array under two names is one
    for module, bundle in _items(path, tree):
        for name, array in _items(path, bundle):
            full = f"{module}/{name}"
            if not isinstance(array, StoredArray) or array.values is None or full in flat:
                raise CheckpointError(f"{path}: {full!r} is not one array", _COPY_AGAIN)
            most -= len(full) + (0 if id(array) in plain else array.values.nbytes)
            if most < 0:
                raise CheckpointError(f"{path} {_TOO_MUCH}; refused, nothing was executed", DO_NOT_TRUST)
            if id(array) not in plain:
                plain[id(array)] = _finite(f"{path}: {full!r}", array.values)
            flat[full] = plain[id(array)]
    return flat


def _finite(where: str, array: Array) -> Array:
    """A writable array in this machine's byte order, in memory of its own. Half precision becomes float32."""
    kind = array.dtype
    wide = np.dtype(np.float32) if kind.kind == "f" and kind.itemsize == 2 else kind.newbyteorder("=")
    if kind.kind == "f" and not np.isfinite(array).all():
        raise CheckpointError(f"{where} holds NaN or infinite values", "the checkpoint is of a diverged training")
    return array.astype(wide, order="C", copy=True)


def _items(path: Path, tree: object) -> list[tuple[str, object]]:
    if not isinstance(tree, dict) or not all(isinstance(name, str) and _is_name(name) for name in tree):
        raise CheckpointError(f"{path} is not a mapping of modules to mappings of arrays", _COPY_AGAIN)
    return list(tree.items())


def _is_name(name: str) -> bool:
    """Names are shown: none is a page long, or steers a terminal."""
    return name.isprintable() and len(name) <= 500
