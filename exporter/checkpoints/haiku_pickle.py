# SPDX-License-Identifier: Apache-2.0
"""Haiku's pickles, read without jax, haiku, or anything in the file being executed.

A pickle is a program: it names Python functions and calls them. The unpickler here answers a dozen names (numpy's
array, dtype and their helpers, Haiku's mappings, jax's array) with stand-ins of its own and refuses every other. Even
numpy's own functions never see what the file says: a stand-in checks it and makes a plain array of numbers.

DeepMind's released files hold ``FlatMapping`` of ``FlatMapping`` of arrays; those of ImageNet a dict of two such,
``params`` and ``state``. Any pickle protocol, and the module paths of numpy 1 and 2, are read.

What a Haiku pickle may name, and what stands in for it when the file is read.

None of numpy's, jax's or Haiku's own functions sees what a file says: a stand-in checks it first.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import CheckpointError

Array = npt.NDArray[Any]

_DTYPES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
DO_NOT_TRUST = "it could execute code when read by others: do not trust this file, ask its author for plain arrays"


class RefusedError(Exception):
    """What is wrong, as the end of a sentence that starts with the file's name."""

    def __init__(self, what: str, hint: str = DO_NOT_TRUST) -> None:
        super().__init__(what)
        self.hint = hint


class StandIn:
    """A function that the file may call. The file cannot change it, as it could set attributes of a real one."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)

    def __setstate__(self, state: object) -> NoReturn:
        raise RefusedError("changes a function")


class _DType:
    """numpy.dtype: its code when called, its byte order with its state."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: object, align: object = False, copy: object = False) -> None:
        if not isinstance(code, str) or code not in _DTYPES:
            shown = code if isinstance(code, str) and code.isprintable() and len(code) < 20 else "of another kind"
            raise RefusedError(f"holds an array whose dtype is {shown}, not a number's")
        self._code, self._order = code, "="

    def __setstate__(self, state: object) -> None:
        # After the version: byte order, sub-dtype, field names, fields. Flags, which follow, are not believed.
        order, *fields = state[1:5] if isinstance(state, tuple) and len(state) >= 5 else ("",)
        if order not in ("<", ">", "=", "|") or fields != [None, None, None]:
            raise RefusedError("holds an array of a dtype with fields")
        self._order = order

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self._order + self._code)


class StoredArray:
    """numpy.ndarray: empty when made, filled by its state ``(version, shape, dtype, Fortran order?, bytes)``.

    It is a view of the file's bytes, for a file can make thousands of the same ones: `_flat` copies what it lets pass.
    """

    __slots__ = ("values",)

    def __init__(self, values: Array | None = None) -> None:
        self.values = values

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedError("holds an array of an unknown layout")
        _, shape, dtype, fortran, data = state
        self.values = _values(data, dtype, shape, "F" if fortran else "C")


def _values(data: object, dtype: object, shape: object, order: object) -> Array:
    """The bytes as the array that they are said to be."""
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _DType):
        raise RefusedError("holds an array of objects")  # a list of them instead of bytes
    kind = dtype.numpy()
    if not _is_shape(shape) or math.prod(shape) * kind.itemsize != len(data):
        raise RefusedError(f"holds an array whose shape does not fit its {len(data)} bytes")
    return np.ndarray(shape, kind, data, order="F" if order == "F" else "C")


def _is_shape(shape: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(shape, tuple) and len(shape) <= 32 and all(isinstance(size, int) and size >= 0 for size in shape)


def _ndarray(*args: object) -> NoReturn:
    raise RefusedError("makes arrays in a way of its own")  # numpy's pickles only name it to `_reconstruct`


def _reconstruct(subtype: object, shape: object, typecode: object) -> StoredArray:
    if subtype is not NAMES["numpy", "ndarray"]:
        raise RefusedError("holds an array of another class than numpy's")
    return StoredArray()


def _frombuffer(data: object, dtype: object, shape: object, order: object, axis_order: object = None) -> StoredArray:
    """Protocol 5. Order K: the axes were sorted by stride when saved, and ``axis_order`` puts them back."""
    values = _values(data, dtype, shape, order)
    if order != "K" or axis_order is None:
        return StoredArray(values)
    if not isinstance(axis_order, tuple | list) or sorted(axis_order) != list(range(values.ndim)):
        raise RefusedError("holds an array whose axes have no order")
    return StoredArray(values.transpose(axis_order))


def _scalar(dtype: object, data: object) -> StoredArray:
    return StoredArray(_values(data, dtype, (), "C"))


def _jax_array(function: object, args: object, state: object, flags: object) -> StoredArray:
    """jax 0.4 and later: numpy's way of making the same array, one level down."""
    if function is not NAMES["numpy.core.multiarray", "_reconstruct"] or not isinstance(args, tuple):
        raise RefusedError("makes an array with another function than numpy's")
    array = _reconstruct(*args)
    array.__setstate__(state)
    return array


def _flat_mapping(mapping: object) -> dict[object, object]:
    if not isinstance(mapping, dict):
        raise RefusedError("makes a FlatMapping of something else than a dict")
    return mapping


def _bytes(*args: object) -> bytes:
    if args:
        raise RefusedError("makes bytes of something")
    return b""  # protocol 2 says `bytes()` for an empty array's


def _names() -> dict[tuple[str, str], object]:
    """Everything that a file may name, in every version of numpy, haiku and jax that writes it."""
    names: dict[tuple[str, str], object] = {
        ("numpy", "ndarray"): StandIn(_ndarray),
        ("numpy", "dtype"): StandIn(_DType),
        ("_codecs", "encode"): None,  # the unpickler's own
        ("jax._src.array", "_reconstruct_array"): StandIn(_jax_array),
    }
    for builtins in ("builtins", "__builtin__"):
        names[builtins, "bytes"] = StandIn(_bytes)
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray", "scalar"] = StandIn(_scalar)
        names[f"{core}.numeric", "_frombuffer"] = StandIn(_frombuffer)
    # One object for both paths: jax names numpy's function, and `is` must find it.
    names["numpy.core.multiarray", "_reconstruct"] = StandIn(_reconstruct)
    names["numpy._core.multiarray", "_reconstruct"] = names["numpy.core.multiarray", "_reconstruct"]
    for mapping in ("FlatMapping", "FlatMap", "frozendict"):
        names["haiku._src.data_structures", mapping] = StandIn(_flat_mapping)
    return names


NAMES: Mapping[tuple[str, str], object] = _names()


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
