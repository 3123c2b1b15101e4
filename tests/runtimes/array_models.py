# SPDX-License-Identifier: Apache-2.0
"""Made-up models of arrays and of sets whose answers are known."""

from __future__ import annotations

from typing import Any

import numpy as np

from perceiver_export.runtimes.manifest import Manifest, Part, TensorSpec
from perceiver_export.runtimes.runtime import Array, Feeds, Runtime
from perceiver_export.runtimes.tasks.arrays import Arrays, Sets
from tests.runtimes.numpy_engine import NumpyEngine

N, C, E = 6, 4, 2


RNG = np.random.default_rng(0)


def spec(name: str, *shape: int | str, dtype: Any = "float32", **ranges: tuple[int, int]) -> TensorSpec:
    return TensorSpec(name, dtype, shape, "", ranges)


def sums(names: tuple[str, ...], feeds: Feeds) -> dict[str, Array]:
    """Each of ``names``: the sum of all inputs over everything but the batch."""
    total = sum(array.reshape(len(array), -1).sum(axis=1, keepdims=True) for array in feeds.values())
    return {name: np.asarray(total, np.float32) for name in names}


def rows(feeds: Feeds) -> dict[str, Array]:
    """An entity's first channels and the sum of all that count: what one gets depends on the others, as in a model."""
    mask = feeds.get("entities_mask", np.ones(feeds["entities"].shape[:2], np.int32))
    total = (feeds["entities"] * mask[..., None]).sum(axis=1, keepdims=True)
    return {"outputs": (feeds["entities"] + total)[..., :E].astype(np.float32)}


def manifest(task: str, parts: dict[str, Part], outputs: tuple[TensorSpec, ...] = ()) -> Manifest:
    return Manifest(1, "m", task, "deepmind", "", {}, parts, None, (), "fp32", (), {}, {}, outputs)


def arrays_of(*inputs: TensorSpec, outputs: tuple[str, ...] = ("total",)) -> tuple[Arrays, NumpyEngine]:
    gives = tuple(spec(name, inputs[0].shape[0], 1, **inputs[0].ranges) for name in outputs)
    described = manifest("arrays", {"model": Part("m.onnx", inputs, gives)})
    Arrays.check(described)
    engine = NumpyEngine(lambda feeds: sums(outputs, feeds), inputs, gives)
    return Arrays(described, lambda _: Runtime(engine, inputs, gives, "fp32")), engine


def sets_of(masked: bool = True, batch: int = 1) -> tuple[Sets, NumpyEngine]:
    inputs: tuple[TensorSpec, ...] = (spec("entities", batch, N, C),)
    if masked:
        inputs += (spec("entities_mask", batch, N, dtype="int32"),)
    gives = (spec("outputs", batch, N, E),)
    described = manifest("sets", {"model": Part("m.onnx", inputs, gives)})
    Sets.check(described)
    engine = NumpyEngine(rows, inputs, gives)
    return Sets(described, lambda _: Runtime(engine, inputs, gives, "fp32")), engine


def two(batch: int | str = 1, **ranges: tuple[int, int]) -> tuple[Arrays, NumpyEngine]:
    return arrays_of(spec("left", batch, 2, 3, **ranges), spec("right", batch, 4, dtype="int32", **ranges))


LEFT, RIGHT = RNG.normal(size=(5, 2, 3)).astype(np.float32), RNG.integers(-9, 9, (5, 4), dtype=np.int32)


TOTALS = LEFT.sum(axis=(1, 2)) + RIGHT.sum(axis=1)
