# SPDX-License-Identifier: Apache-2.0
"""From examples to calls: batches of the model's size, and all parts of a bundle run in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from perceiver_export.calibration.data.samples import Example
from perceiver_export.runtimes.manifest import Manifest, Part, index_input
from perceiver_export.runtimes.runtime import Array, Feeds

_DYNAMIC_QUERIES = 256  # query indices per call, if their number is dynamic

Run = Callable[[Feeds], Mapping[str, Array]]


@dataclass(frozen=True)
class Call:
    """One call's feeds and outputs, by part."""

    feeds: dict[str, dict[str, Array]]
    outputs: dict[str, Mapping[str, Array]]


def batch_size(manifest: Manifest) -> int:
    """The number of samples per call; 1 if it is dynamic."""
    first = next(iter(manifest.parts.values())).inputs[0].shape[0]
    return first if isinstance(first, int) else 1


def batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Lists of ``size`` examples. The last one is padded by repeating its own examples, which changes no bound."""
    stream = iter(examples)
    while batch := list(itertools.islice(stream, size)):
        yield [batch[index % len(batch)] for index in range(size)]


def run_parts(manifest: Manifest, runs: Mapping[str, Run], feeds: Feeds, generator: np.random.Generator) -> Call:
    """Run every part in order. A decoder that takes query indices gets random ones."""
    call, available = Call({}, {}), dict(feeds)
    batch = len(next(iter(feeds.values())))
    for name, part in manifest.parts.items():
        arrays = available | _queries(part, batch, generator)
        call.feeds[name] = {spec.name: arrays[spec.name] for spec in part.inputs}
        call.outputs[name] = runs[name](call.feeds[name])
        if name == "encoder":
            available["latents"] = call.outputs[name]["latents"]
    return call


def skip_parts(manifest: Manifest, batch: int, generator: np.random.Generator) -> None:
    """Draw the random numbers that `run_parts` draws for a call, without running anything."""
    for part in manifest.parts.values():
        _queries(part, batch, generator)


def _queries(part: Part, batch: int, generator: np.random.Generator) -> dict[str, Array]:
    """Random query indices by the name of their input; empty for a part that takes none."""
    spec = index_input(part.inputs)
    if spec is None or part.num_queries is None:
        return {}
    least, most = spec.limits(1)
    count = most if least == most else min(most, _DYNAMIC_QUERIES)
    first = spec.shape[0]
    rows = (first if isinstance(first, int) else batch, count)
    return {spec.name: np.sort(generator.integers(part.num_queries, size=rows), axis=1).astype(np.int32)}
