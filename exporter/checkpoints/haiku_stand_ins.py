# SPDX-License-Identifier: Apache-2.0
"""What a Haiku pickle may name, and what stands in for it when the file is read.

None of numpy's, jax's or Haiku's own functions sees what a file says: a stand-in checks it first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeGuard

import numpy as np
import numpy.typing as npt

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
