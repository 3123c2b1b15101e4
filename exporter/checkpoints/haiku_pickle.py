# SPDX-License-Identifier: Apache-2.0
"""Read Haiku's pickles without jax or haiku, and without executing anything in them.

A pickle is a program: it names Python functions and calls them. The unpickler here knows a dozen names (numpy's array,
dtype and their helpers, Haiku's mappings, jax's array) and refuses all others. The real functions are never called: for
each name, a function of this module checks its arguments and makes a plain array of numbers.

DeepMind's released files hold a ``FlatMapping`` of ``FlatMapping`` of arrays; those for ImageNet hold a dict of two
such mappings, ``params`` and ``state``. All pickle protocols, and the module paths of numpy 1 and 2, are supported.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import CheckpointError
from perceiver_export.runtimes.files import reading

Array = npt.NDArray[Any]

_DTYPES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
_DO_NOT_TRUST = "do not trust this file, because other readers would run its code: ask its author for plain arrays"
_SAVE_NUMPY = "save plain arrays: jax.tree_util.tree_map(lambda x: numpy.asarray(x, numpy.float32), params)"
_COPY_AGAIN = "give a pickle of Haiku parameters as DeepMind released them; if it is one, copy it again"
# Extensions bypass find_class and come from a process-wide table; persistent ids refer to objects outside the file.
_REFUSED_OPCODES = frozenset(("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"))
_MEMO_OPCODES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZh": "bzip2", b"\xfd7z": "xz", b"\x28\xb5": "zstd"}
_SLACK = 1 << 20  # bytes of names and small arrays beyond the size of the file


class _RefusedError(Exception):
    """The end of a sentence that starts with the file's name."""

    def __init__(self, what: str, hint: str = _DO_NOT_TRUST) -> None:
        super().__init__(what)
        self.hint = hint


class _StandIn:
    """A function that the file may call. Unlike a real one, it has no attributes that the file could set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)

    def __setstate__(self, state: object) -> NoReturn:
        raise _RefusedError("changes a function")


class _DType:
    """numpy.dtype: the call gives its code, the state its byte order."""

    __slots__ = ("kind",)

    def __init__(self, code: object, align: object = False, copy: object = False) -> None:
        if not isinstance(code, str) or code not in _DTYPES:
            shown = code if isinstance(code, str) and code.isprintable() and len(code) < 20 else "of another kind"
            raise _RefusedError(f"holds an array whose dtype is {shown}, which is not numeric")
        self.kind = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        # After the version: byte order, sub-dtype, field names, fields. The flags that follow are ignored.
        order, *fields = state[1:5] if isinstance(state, tuple) and len(state) >= 5 else ("",)
        if order not in ("<", ">", "=", "|") or fields != [None, None, None]:
            raise _RefusedError("holds an array of a dtype with fields")
        self.kind = self.kind.newbyteorder(order)


class _Stored:
    """numpy.ndarray: empty when made, filled by its state ``(version, shape, dtype, Fortran order?, bytes)``.

    It is a view of the file's bytes, because a file can refer to the same ones thousands of times; `_flat` copies it.
    """

    __slots__ = ("values",)

    def __init__(self, values: Array | None = None) -> None:
        self.values = values

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _RefusedError("holds an array of an unknown layout")
        _, shape, dtype, fortran, data = state
        self.values = _values(data, dtype, shape, "F" if fortran else "C")


def _values(data: object, dtype: object, shape: object, order: object) -> Array:
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _DType):
        raise _RefusedError("holds an array of objects")  # as a list instead of bytes
    sizes = shape if isinstance(shape, tuple) else (-1,)
    whole = len(sizes) <= 32 and all(isinstance(size, int) and size >= 0 for size in sizes)
    if not whole or math.prod(sizes) * dtype.kind.itemsize != len(data):
        raise _RefusedError(f"holds an array whose shape does not fit its {len(data)} bytes")
    return np.ndarray(sizes, dtype.kind, data, order="F" if order == "F" else "C")


def _ndarray(*args: object) -> NoReturn:
    raise _RefusedError("makes arrays in an unknown way")  # numpy's pickles only name it to `_reconstruct`


def _reconstruct(subtype: object, shape: object, typecode: object) -> _Stored:
    if subtype is not _NAMES["numpy.ndarray"]:
        raise _RefusedError("holds an array whose class is not numpy's")
    return _Stored()


def _frombuffer(data: object, dtype: object, shape: object, order: object, axis_order: Any = None) -> _Stored:
    """Protocol 5. Order K: the axes were sorted by stride when saved, and ``axis_order`` puts them back."""
    values = _values(data, dtype, shape, order)
    return _Stored(values.transpose(axis_order) if order == "K" and axis_order is not None else values)


def _jax_array(function: object, args: Any, state: object, flags: object) -> _Stored:
    """jax 0.4 and later: numpy's call that makes the same array, one level down."""
    if function is not _RECONSTRUCT:
        raise _RefusedError("makes an array with a function that is not numpy's")
    array = _reconstruct(*args)
    array.__setstate__(state)
    return array


def _encode(text: object, encoding: object) -> bytes:
    """Protocol 2 writes bytes as a text to encode."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError("encodes text")
    return text.encode("latin1")


_RECONSTRUCT = _StandIn(_reconstruct)
_SCALAR = _StandIn(lambda dtype, data: _Stored(_values(data, dtype, (), "C")))
_MAPPING = _StandIn(lambda mapping: mapping)
_BYTES = _StandIn(lambda: b"")  # protocol 2 writes the bytes of an empty array as `bytes()`
# Every name that any version of numpy, haiku and jax writes.
_NAMES: dict[str, object] = {
    "numpy.ndarray": _StandIn(_ndarray),
    "numpy.dtype": _StandIn(_DType),
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy.core.multiarray.scalar": _SCALAR,
    "numpy._core.multiarray.scalar": _SCALAR,
    "numpy.core.numeric._frombuffer": _StandIn(_frombuffer),
    "numpy._core.numeric._frombuffer": _StandIn(_frombuffer),
    "jax._src.array._reconstruct_array": _StandIn(_jax_array),
    "haiku._src.data_structures.FlatMapping": _MAPPING,
    "haiku._src.data_structures.FlatMap": _MAPPING,
    "haiku._src.data_structures.frozendict": _MAPPING,
    "builtins.bytes": _BYTES,
    "__builtin__.bytes": _BYTES,
}


class _Unpickler(pickle.Unpickler):
    """Builds dicts, tuples, lists, strings, numbers, and the types of `_NAMES`."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        # A text is encoded once, however often a file asks.
        self._names = {**_NAMES, "_codecs.encode": _StandIn(functools.cache(_encode))}

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full not in self._names:
            shown = full if full.isprintable() and len(full) <= 100 else ascii(full[:100])
            hint = _SAVE_NUMPY if module.startswith(("jax", "ml_dtypes")) else _DO_NOT_TRUST
            raise _RefusedError(f"names the class {shown}, which is neither an array nor a mapping", hint)
        return self._names[full]


def read_haiku(path: Path) -> dict[str, Array]:
    """Parameters and state of a Haiku pickle, which holds bare parameters, or a mapping of ``params`` and ``state``.

    Arrays by ``module/path/parameter``, as Haiku names them. Linear ``w`` are (in, out), convolution ``w`` are HWIO.
    They have the types of the file, in this machine's byte order.

    Raises CheckpointError if the file is missing, not a pickle or damaged, or names anything but arrays and mappings.
    """
    content = _content(path)
    tree = _unpickle(path, content)
    if not isinstance(tree, dict) or not tree:
        raise CheckpointError(f"{path} holds no mapping of parameters", _COPY_AGAIN)
    params: object = tree
    state: object = {}
    if isinstance(tree.get("params"), dict) and all(isinstance(module, dict) for module in tree["params"].values()):
        more = sorted(name for name, _ in _items(path, tree) if name not in ("params", "state"))
        if more:
            named = ", ".join(more[:5]) + (" …" if len(more) > 5 else "")
            raise CheckpointError(f"{path} holds {named} beside params and state", "save a dict of these two only")
        params, state = tree["params"], tree.get("state") or {}
    # A file can hold the same bytes under any number of names.
    most = len(content) + _SLACK
    return {**_flat(path, params, most), **_flat(path, state, most)}


def _content(path: Path) -> bytes:
    with reading(path, CheckpointError, "give a pickle file"):
        content = path.read_bytes()
    if not content:
        raise CheckpointError(f"{path} is empty", "copy the checkpoint again")
    for magic, kind in _COMPRESSED.items():
        if content.startswith(magic):
            raise CheckpointError(f"{path} is a {kind} file, not a pickle", "unpack it, then give the pickle inside")
    return content


def _unpickle(path: Path, content: bytes) -> object:
    try:
        for opcode, argument, _ in pickletools.genops(content):  # these go past `find_class`
            if opcode.name in _REFUSED_OPCODES:
                raise _RefusedError("refers to objects outside the file")
            if opcode.name in _MEMO_OPCODES and argument is not None and argument > len(content):
                raise _RefusedError(f"needs a memo of {argument} entries")  # gigabytes, for a file of a few bytes
        return _Unpickler(content).load()
    except _RefusedError as error:
        raise CheckpointError(f"{path} {error}; refused, nothing was executed", error.hint) from error
    except Exception as error:  # a damaged pickle makes Python raise anything
        raise CheckpointError(f"{path} is not a readable pickle: it is truncated or damaged", _COPY_AGAIN) from error


def _flat(path: Path, tree: object, most: int) -> dict[str, Array]:
    """{module: {name: array}} as {module/name: array}, with ``most`` bytes of arrays and names in all."""
    flat: dict[str, Array] = {}
    for module, bundle in _items(path, tree):
        for name, array in _items(path, bundle):
            full = f"{module}/{name}"
            if not isinstance(array, _Stored) or array.values is None or full in flat:
                raise CheckpointError(f"{path}: {full!r} is not one array", _COPY_AGAIN)
            most -= len(full) + array.values.nbytes
            if most < 0:
                raise CheckpointError(f"{path} expands beyond its size; nothing was executed", _DO_NOT_TRUST)
            flat[full] = array.values.astype(array.values.dtype.newbyteorder("="), order="C", copy=True)
    return flat


def _items(path: Path, tree: object) -> list[tuple[str, object]]:
    """A mapping's items. Names are printed, so each must be short and printable: none can control a terminal."""
    if not isinstance(tree, dict) or not all(
        isinstance(name, str) and name.isprintable() and len(name) <= 500 for name in tree
    ):
        raise CheckpointError(f"{path} is not a mapping of modules to mappings of arrays", _COPY_AGAIN)
    return list(tree.items())
