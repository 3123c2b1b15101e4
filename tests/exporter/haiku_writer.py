# SPDX-License-Identifier: Apache-2.0
"""Pickles as Haiku writes them, without Haiku."""

from __future__ import annotations

import contextlib
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock


class FlatMapping(Mapping[str, Any]):
    """Pickled as Haiku 0.0.3 to 0.0.17 pickle theirs."""

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        self._mapping = dict(mapping)

    def __getitem__(self, key: str) -> Any:
        return self._mapping[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)

    def __reduce__(self) -> tuple[Any, ...]:
        return FlatMapping, (self._mapping,)


FlatMapping.__module__ = "haiku._src.data_structures"


def flat_mappings(tree: Mapping[str, Mapping[str, object]]) -> FlatMapping:
    return FlatMapping({module: FlatMapping(bundle) for module, bundle in tree.items()})


@contextlib.contextmanager
def modules(path: str, **content: object) -> Iterator[None]:
    """A module of this name, and its parents, for as long as the context lasts."""
    parts = path.split(".")
    made = {".".join(parts[: i + 1]): types.ModuleType(parts[i]) for i in range(len(parts))}
    vars(made[path]).update(content)
    with mock.patch.dict(sys.modules, made):
        yield


def dumps(content: object, protocol: int = 4) -> bytes:
    with modules(FlatMapping.__module__, FlatMapping=FlatMapping):
        return pickle.dumps(content, protocol=protocol)


def write(path: Path, content: object, protocol: int = 4) -> Path:
    """Bytes are written as they are, everything else is pickled."""
    path.write_bytes(content if isinstance(content, bytes) else dumps(content, protocol))
    return path
