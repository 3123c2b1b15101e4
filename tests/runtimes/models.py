# SPDX-License-Identifier: Apache-2.0
"""Manifests and tasks around graphs that are functions of numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from perceiver_export.runtimes.manifest import Manifest, Part, TensorSpec
from perceiver_export.runtimes.runtime import Array, Feeds, Runtime
from perceiver_export.runtimes.tasks.base import Task

Function = Callable[[Feeds], dict[str, Array]]
T = TypeVar("T", bound=Task)


class NumpyEngine:
    """An engine that runs a function of numpy in the place of a graph. ``calls`` are the feeds that it was given."""

    def __init__(self, function: Function, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.function, self.inputs, self.outputs = function, inputs, outputs
        self.calls: list[Feeds] = []

    def run(self, feeds: Feeds, out: Any = None) -> dict[str, Array]:
        assert out is None
        self.calls.append(feeds)
        return self.function(feeds)

    def describe(self) -> dict[str, Any]:
        return {"engine": "numpy", "version": "0", "device": "cpu", "precision": "fp32"}


def spec(name: str, *shape: int | str, dtype: Any = "float32", **ranges: tuple[int, int]) -> TensorSpec:
    return TensorSpec(name, dtype, shape, "", ranges, (0, 1) if name.endswith("_mask") else None)


def manifest(task: str, parts: Mapping[str, Part] | NumpyEngine, preprocessing: Any = None, **fields: Any) -> Manifest:
    """A manifest of these parts, or of one engine."""
    if isinstance(parts, NumpyEngine):
        parts = {"model": Part("m.onnx", parts.inputs, parts.outputs)}
    given: dict[str, Any] = {
        "schema_version": 1,
        "name": "m",
        "task": task,
        "parity": "deepmind",
        "source": "",
        "architecture": {},
        "parts": dict(parts),
        "preprocessing": preprocessing,
        "labels": (),
        "precision": "fp32",
        "verification": (),
        "tools": {},
        "files": {},
    }
    return Manifest(**{**given, **fields})


def opened(kind: type[T], described: Manifest, engines: NumpyEngine | Mapping[str, NumpyEngine], *more: Any) -> T:
    """The task, as `open_task` makes it; ``whole`` is the engine of a split bundle's joined parts."""
    kind.check(described)

    def load(name: str | None) -> Runtime:
        engine = engines if isinstance(engines, NumpyEngine) else engines[name or "whole"]
        return Runtime(engine, engine.inputs, engine.outputs, "fp32")

    return kind(described, load, *more)
