# SPDX-License-Identifier: Apache-2.0
"""A JSON file of a model's sizes as a struct; what is wrong in it is named."""

from __future__ import annotations

import difflib
import re
import typing
from pathlib import Path
from typing import TypeVar

import msgspec

from perceiver_export.runtimes.errors import CheckpointError

_T = TypeVar("_T")


def read_bytes(path: Path, what: str) -> bytes:
    """The content of ``path``, which should be ``what``. Raises CheckpointError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", f"give {what}") from error


def decode_json(content: bytes, kind: type[_T], where: str) -> _T:
    """JSON as ``kind``. Raises CheckpointError that names the field, and for a misspelt one the nearest there is."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{where}: {error}", _hint(str(error), kind)) from error


def _hint(message: str, kind: type[object]) -> str:
    known = _fields(kind)
    unknown = re.search(r"unknown field `(.*?)`", message)
    if unknown:
        near = difflib.get_close_matches(unknown[1], known, n=1)
        if near:
            return f"did you mean {near[0]}?"
    return f"its fields: {', '.join(known)}"


def _fields(kind: type[object]) -> list[str]:
    """Names of all fields, those of structs inside included."""
    names = []
    for name, annotation in typing.get_type_hints(kind).items():
        names.append(name)
        if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
            names += _fields(annotation)
    return list(dict.fromkeys(names))
