# SPDX-License-Identifier: Apache-2.0
"""Inputs to trace and to verify a graph with: random, and such as the model may see."""

from __future__ import annotations

import numpy as np

from perceiver_export.exporter.parts import GraphPart
from perceiver_export.exporter.perceiver.config import ArrayInput, PerceiverConfig, TokenInput
from perceiver_export.runtimes.manifest import TensorSpec
from perceiver_export.runtimes.runtime import Array


def sample_inputs(
    part: GraphPart, config: PerceiverConfig, sizes: dict[str, int], seed: int, scale: float = 1.0
) -> dict[str, Array]:
    """Arrays for every input of ``part``; ``sizes`` gives each dynamic dimension a number.

    Numbers are normal times ``scale``, coordinates of points between -1 and 1 (their Fourier features are all that the
    model sees, and mean nothing further out); tokens and queries any of those there are; masks leave out the last
    elements, another number of them in each sample.
    """
    rng = np.random.default_rng(seed)
    return {spec.name: _sample(spec, part, config, sizes, rng, scale) for spec in part.inputs}


def _sample(
    spec: TensorSpec,
    part: GraphPart,
    config: PerceiverConfig,
    sizes: dict[str, int],
    rng: np.random.Generator,
    scale: float,
) -> Array:
    shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
    one = config.inputs.get(spec.name)
    if isinstance(one, TokenInput):
        return rng.integers(0, one.vocabulary_size, shape, dtype=np.int32)
    if isinstance(one, ArrayInput) and one.value_positions is not None:
        return rng.uniform(-1, 1, shape).astype(np.float32)
    if spec.name == "queries" and part.num_queries is not None:
        return rng.integers(0, part.num_queries, shape, dtype=np.int32)
    if spec.dtype == "int32":
        there = rng.integers(1, shape[1], shape[0], endpoint=True)
        return (np.arange(shape[1]) < there[:, None]).astype(np.int32)
    return (rng.normal(size=shape) * scale).astype(np.float32)
