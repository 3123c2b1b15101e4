# SPDX-License-Identifier: Apache-2.0
"""Find the weight files that an ONNX graph refers to, by parsing its protobuf without the onnx package.

Field numbers are from onnx.proto (ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from perceiver_export.runtimes.errors import BundleError

_LOCATION = b"location"  # the key of the file name in TensorProto.external_data
_DEEPEST = 100  # levels of nested messages, protobuf's own limit
# By message, the numbers of the fields that lead to a tensor, and the message in each field.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def external_files(path: Path) -> set[str]:
    """The names of weight files as written in the graph. Raises BundleError: not a graph, or missing."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return set(_names(content, 0, len(content), "model", 0))
    except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
        raise BundleError(f"{path} is not an ONNX graph: {error}", "copy or export the bundle again") from error


def _names(content: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    if message == "entry":
        fields = {number: content[first:last] for number, first, last in _fields(content, start, end)}
        if fields.get(1) == _LOCATION:
            yield fields.get(2, b"").decode()
        return
    inside = _FIELDS[message]
    for number, first, last in _fields(content, start, end):
        # A message without the key is skipped: most nodes contain no tensor.
        if number in inside and content.find(_LOCATION, first, last) >= 0:
            yield from _names(content, first, last, inside[number], depth + 1)


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The number, start and end of each length-delimited field."""
    while start < end:
        tag, start = _varint(content, start, end)
        kind = tag & 7
        if kind == 0:
            _, start = _varint(content, start, end)
        elif kind in (1, 5):
            start += 8 if kind == 1 else 4
        elif kind == 2:
            size, first = _varint(content, start, end)
            start = first + size
            if start <= end:
                yield tag >> 3, first, start
        else:
            raise ValueError("it is damaged")
    if start != end:
        raise ValueError("it is truncated")


def _varint(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if start >= end:
            raise ValueError("it is truncated")
        byte = content[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
    raise ValueError("it is damaged")
