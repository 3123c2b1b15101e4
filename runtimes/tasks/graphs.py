# SPDX-License-Identifier: Apache-2.0
"""What tasks ask of a bundle's graphs: do they fit the task, and run any number of samples through them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from perceiver_export.runtimes.errors import BundleError, InputError
from perceiver_export.runtimes.manifest import Manifest, TensorSpec
from perceiver_export.runtimes.runtime import Array, Feeds, Runtime

# Shape after the batch dimension; None is any size.
Shape = tuple[int | None, ...]
_Given = TypeVar("_Given")

_AGAIN = "export the bundle again"


def interface(manifest: Manifest) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the whole model, be it one graph or split into encoder and decoders."""
    if "encoder" in manifest.parts:
        # A decoder may want more than the encoder takes: queries that are given as an array.
        taken = {spec.name: spec for part in manifest.parts.values() for spec in part.inputs}
        return tuple(spec for name, spec in taken.items() if name not in ("latents", "queries")), manifest.outputs
    part = next(iter(manifest.parts.values()))
    return part.inputs, part.outputs


def check_interface(manifest: Manifest, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> None:
    """Raise BundleError unless the model takes and gives these tensors; shapes are without the batch dimension."""
    for specs, expected, verb in zip(interface(manifest), (inputs, outputs), ("takes", "gives"), strict=True):
        found = {spec.name: spec.shape[1:] for spec in specs}
        fits = found.keys() == expected.keys() and all(_fits(found[name], expected[name]) for name in found)
        if not fits:
            raise BundleError(
                f"a bundle for {manifest.task} {verb} {_listed(expected)}, this graph {verb} {_listed(found)}", _AGAIN
            )


def check_labels(manifest: Manifest, output: str) -> None:
    """Raise BundleError where the labels' number is not that of the output's scores. No labels at all is fine."""
    spec = next(spec for spec in interface(manifest)[1] if spec.name == output)
    if manifest.labels and spec.shape[-1] != len(manifest.labels):
        raise BundleError(f"{len(manifest.labels)} labels do not fit {spec.shape[-1]} scores", _AGAIN)


def limits(spec: TensorSpec, axis: int) -> tuple[int, int]:
    """The least and the most that this dimension may be."""
    size = spec.shape[axis]
    return (size, size) if isinstance(size, int) else spec.ranges[size]


def as_list(given: Iterable[_Given], what: str) -> list[_Given]:
    """The samples that are given. Raises InputError: none; or one alone, a path or a text, which is no list."""
    if isinstance(given, (str, bytes, os.PathLike)) or not isinstance(given, Iterable):
        raise InputError(f"the {what} are of type {type(given).__name__}", f"give a list of {what}, even of one")
    samples = list(given)
    if not samples:
        raise InputError(f"no {what} are given", "give one or more")
    return samples


def count_samples(feeds: Feeds) -> int:
    """How many samples there are. Raises InputError: none, or not the same number in each feed."""
    counts = {name: len(array) for name, array in feeds.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        found = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise InputError(f"samples: {found or 'none'}", "give every input the same number of samples, 1 or more")
    return next(iter(counts.values()))


def pad_batch(runtime: Runtime, feeds: Feeds) -> dict[str, Array]:
    """The feeds with the last sample repeated until there are as many as the graph wants at least."""
    least, _ = limits(runtime.inputs[0], 0)
    return {name: _repeat_last(array, least - len(array)) for name, array in feeds.items()}


def run_batched(runtime: Runtime, feeds: Feeds) -> dict[str, Array]:
    """Outputs of n samples by name, in calls of the batch that the graph was exported for.

    Each feed is (n, ...). A last short call is padded with copies of its last sample, which are cut off again.

    Raises InputError: no sample, feeds of different n, and all that `Runtime.run` refuses.
    """
    count, most = count_samples(feeds), limits(runtime.inputs[0], 0)[1]
    results: list[dict[str, Array]] = []
    for start in range(0, count, most):
        chunk = {name: array[start : start + most] for name, array in feeds.items()}
        results.append(runtime.run(pad_batch(runtime, chunk)))
    return {spec.name: _joined([result[spec.name] for result in results])[:count] for spec in runtime.outputs}


def _joined(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _repeat_last(array: Array, times: int) -> Array:
    return array if times <= 0 else np.concatenate([array, np.repeat(array[-1:], times, axis=0)])


def _fits(shape: tuple[int | str, ...], expected: Shape) -> bool:
    return len(shape) == len(expected) and all(
        most is None or size == most for size, most in zip(shape, expected, strict=True)
    )


def _listed(shapes: Mapping[str, Sequence[int | str | None]]) -> str:
    return ", ".join(
        f"{name} ({' × '.join('any' if size is None else str(size) for size in shape)})"
        for name, shape in shapes.items()
    )
