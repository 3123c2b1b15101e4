# SPDX-License-Identifier: Apache-2.0
"""A bundle's parts run one after the other on the same samples: the encoder's latents are the decoders' input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from perceiver_export.calibration.feeds import Example
from perceiver_export.runtimes.manifest import Manifest, Part, TensorSpec
from perceiver_export.runtimes.runtime import Array, Feeds

_DYNAMIC_QUERIES = 256

Run = Callable[[Feeds], Mapping[str, Array]]


def batch_size(manifest: Manifest) -> int:
    """How many samples a call takes; 1 where that is dynamic."""
    first = next(iter(manifest.parts.values())).inputs[0].shape[0]
    return first if isinstance(first, int) else 1


def batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Lists of ``size`` examples; a last short one is filled up with its own, which changes no bound."""
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield [batch[index % len(batch)] for index in range(size)]


def stack(batch: Sequence[Example]) -> dict[str, Array]:
    """The arrays of several samples on a batch axis."""
    return {name: np.stack([example.feeds[name] for example in batch]) for name in batch[0].feeds}


def run_parts(
    manifest: Manifest, runs: Mapping[str, Run], feeds: Feeds, generator: np.random.Generator
) -> tuple[dict[str, dict[str, Array]], dict[str, Mapping[str, Array]]]:
    """Feeds and outputs of every part. A decoder that takes query indices gets random ones."""
    given: dict[str, dict[str, Array]] = {}
    outputs: dict[str, Mapping[str, Array]] = {}
    latents: Mapping[str, Array] = {}
    for name, part in manifest.parts.items():
        available = {**feeds, **latents}
        given[name] = {spec.name: _input(spec, part, available, generator) for spec in part.inputs}
        outputs[name] = runs[name](given[name])
        if name == "encoder":
            latents = {"latents": outputs[name]["latents"]}
    return given, outputs


def _input(spec: TensorSpec, part: Part, available: Mapping[str, Array], generator: np.random.Generator) -> Array:
    if spec.name != "queries" or part.num_queries is None:
        return available[spec.name]
    count = spec.shape[1]
    if not isinstance(count, int):
        count = min(spec.ranges[count][1], _DYNAMIC_QUERIES)
    batch = next(iter(available.values())).shape[0]
    return np.sort(generator.integers(part.num_queries, size=(batch, count)), axis=1).astype(np.int32)
