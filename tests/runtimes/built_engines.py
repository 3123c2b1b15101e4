# SPDX-License-Identifier: Apache-2.0
"""What tests ask of engines that were built, and of the directory that they lie in."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from perceiver_export.runtimes import load
from perceiver_export.runtimes.engines.cache import Record, read_key
from perceiver_export.runtimes.files import encode_json

IMAGE = np.random.default_rng(0).normal(size=(1, 3, 28, 28)).astype(np.float32)


def answered(bundle: Path, target: str) -> tuple[str, Any]:
    """Where the engine was compiled, and its logits."""
    with load(bundle, target) as runtime:
        return runtime.describe()["compiled"], runtime.run({"image": IMAGE})["logits"]


def logits(bundle: Path, target: str) -> Any:
    return answered(bundle, target)[1]


def compiled(bundle: Path, target: str) -> str:
    return answered(bundle, target)[0]


def left_behind(bundle: Path) -> list[str]:
    """Everything below engines/ that is no complete engine."""
    place = bundle / "engines"
    return [str(entry.relative_to(place)) for entry in place.glob("*/*") if not (entry / "engine.json").is_file()]


def edit_record(directory: Path, edit: Callable[[dict[str, Any]], None], sign: bool = True) -> None:
    """Change engine.json, as its builder would have written it unless ``sign`` is False."""
    path = directory / "engine.json"
    document = json.loads(path.read_bytes())
    edit(document)
    record = msgspec.convert(document, Record)
    path.write_bytes(encode_json(record.signed(read_key()) if sign else record))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """The kernel writes no more to a file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
