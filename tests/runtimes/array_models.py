# SPDX-License-Identifier: Apache-2.0
"""Models of arrays and of sets with known answers."""

from __future__ import annotations

import numpy as np

from perceiver_export.runtimes.manifest import TensorSpec
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks.arrays import Arrays, Sets
from tests.runtimes.models import manifest, opened, spec
from tests.runtimes.numpy_engine import NumpyEngine

N, C, E = 6, 4, 2
RNG = np.random.default_rng(0)
LEFT, RIGHT = RNG.normal(size=(5, 2, 3)).astype(np.float32), RNG.integers(-9, 9, (5, 4), dtype=np.int32)
TOTALS = LEFT.sum(axis=(1, 2)) + RIGHT.sum(axis=1)


def sums(names: tuple[str, ...], feeds: Feeds) -> dict[str, Array]:
    """Each of ``names``: the sum of all inputs over everything but the batch."""
    total = sum(array.reshape(len(array), -1).sum(axis=1, keepdims=True) for array in feeds.values())
    return {name: np.asarray(total, np.float32) for name in names}


def rows(feeds: Feeds) -> dict[str, Array]:
    """An entity's first channels and the sum of all that count: each answer depends on the others, as in a model."""
    mask = feeds.get("entities_mask", np.ones(feeds["entities"].shape[:2], np.int32))
    total = (feeds["entities"] * mask[..., None]).sum(axis=1, keepdims=True)
    return {"outputs": (feeds["entities"] + total)[..., :E].astype(np.float32)}


def arrays_of(*inputs: TensorSpec, outputs: tuple[str, ...] = ("total",)) -> tuple[Arrays, NumpyEngine]:
    gives = tuple(spec(name, inputs[0].shape[0], 1, **inputs[0].ranges) for name in outputs)
    engine = NumpyEngine(lambda feeds: sums(outputs, feeds), inputs, gives)
    return opened(Arrays, manifest("arrays", engine), engine), engine


def sets_of(masked: bool = True, batch: int = 1) -> tuple[Sets, NumpyEngine]:
    inputs = (spec("entities", batch, N, C), spec("entities_mask", batch, N, dtype="int32"))[: 1 + masked]
    engine = NumpyEngine(rows, inputs, (spec("outputs", batch, N, E),))
    return opened(Sets, manifest("sets", engine), engine), engine


def two(batch: int | str = 1, **ranges: tuple[int, int]) -> tuple[Arrays, NumpyEngine]:
    return arrays_of(spec("left", batch, 2, 3, **ranges), spec("right", batch, 4, dtype="int32", **ranges))
