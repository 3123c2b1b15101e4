# SPDX-License-Identifier: Apache-2.0
"""What tests ask of engines that were built, and of the directory that they lie in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.runtimes import load

IMAGE = np.random.default_rng(0).normal(size=(1, 3, 28, 28)).astype(np.float32)


def logits(bundle: Path, target: str) -> Any:
    with load(bundle, target) as runtime:
        return runtime.run({"image": IMAGE})["logits"]


def compiled(bundle: Path, target: str) -> str:
    with load(bundle, target) as runtime:
        return str(runtime.describe()["compiled"])


def left_behind(bundle: Path) -> list[str]:
    """Everything below engines/ that is neither a whole engine nor a lock."""
    place = bundle / "engines"
    return [
        str(entry.relative_to(place))
        for entry in place.glob("*/*")
        if entry.name != ".lock" and not (entry / "engine.json").is_file()
    ]


def edit_record(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "engine.json"
    record = json.loads(path.read_bytes())
    edit(record)
    path.write_text(json.dumps(record), encoding="utf-8")
