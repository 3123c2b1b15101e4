# SPDX-License-Identifier: Apache-2.0
"""From examples to calls: batches of the model's size, and all parts of a bundle run in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from perceiver_export.calibration.data.samples import Example
from perceiver_export.runtimes.manifest import Manifest, Part, TensorSpec, index_input
from perceiver_export.runtimes.runtime import Array, Feeds

_DYNAMIC_QUERIES = 256  # query indices a call, where their number is dynamic

Run = Callable[[Feeds], Mapping[str, Array]]


def batch_size(manifest: Manifest) -> int:
    """The number of samples per call; 1 if it is dynamic."""
    first = next(iter(manifest.parts.values())).inputs[0].shape[0]
    return first if isinstance(first, int) else 1


def batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Lists of ``size`` examples. The last one is padded by repeating its own examples, which changes no bound."""
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield [batch[index % len(batch)] for index in range(size)]


def run_parts(
    manifest: Manifest, runs: Mapping[str, Run], feeds: Feeds, generator: np.random.Generator
) -> tuple[dict[str, dict[str, Array]], dict[str, Mapping[str, Array]]]:
    """Run every part in order and return its feeds and outputs. A decoder that takes query indices gets random ones."""
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
    if not _is_drawn(spec, part):
        return available[spec.name]
    return _queries(spec, part, next(iter(available.values())).shape[0], generator)


def skip_parts(manifest: Manifest, batch: int, generator: np.random.Generator) -> None:
    """Draw what `run_parts` draws for a call, and run nothing."""
    for part in manifest.parts.values():
        for spec in part.inputs:
            if _is_drawn(spec, part):
                _queries(spec, part, batch, generator)


def _is_drawn(spec: TensorSpec, part: Part) -> bool:
    return part.num_queries is not None and spec is index_input(part.inputs)


def _queries(spec: TensorSpec, part: Part, batch: int, generator: np.random.Generator) -> Array:
    least, most = spec.limits(1)
    count = most if least == most else min(most, _DYNAMIC_QUERIES)
    first = spec.shape[0]
    rows = (first if isinstance(first, int) else batch, count)
    return np.sort(generator.integers(part.num_queries or 0, size=rows), axis=1).astype(np.int32)
