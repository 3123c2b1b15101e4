# SPDX-License-Identifier: Apache-2.0
"""What is compared: a bundle on a target, or any function from inputs to outputs, such as the checkpoint in torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perceiver_export.calibration.examples import Example
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.certificates import device_of, engine_of, precision_of
from perceiver_export.runtimes.engines.records import graphs_of
from perceiver_export.runtimes.errors import BrokenReferenceError, GateError, UsageError
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks import open_task
from perceiver_export.runtimes.tasks.base import Task
from perceiver_export.runtimes.tasks.graphs import interface, run_batched

# A reference that is not a bundle: preprocessed inputs (n, ...) by name -> outputs (n, ...) by name. It may have a
# ``name``, and ``described``: what a bundle's side has in `Side.engine`, without which nothing is certified against it.
Reference = Callable[[Feeds], Mapping[str, Array]]

_BROKEN = "nothing can be held against it: look at that sample and at the model, or give another reference"
_SAME = "a reference gives the same outputs as the bundle, by name, a row a sample"


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    ``engine``: what it runs on (`Runtime.describe`), the ``device``'s name, the SHA-256 of the ``graphs`` that run, by
    file, and the scheme of its ``quantization``, if it is quantized.
    """

    name: str
    run: Reference
    engine: dict[str, Any]

    @property
    def described(self) -> dict[str, Any]:
        """Name and engine, as results and reports show them."""
        return {"name": self.name, **self.engine}


@contextlib.contextmanager
def open_side(
    what: str | os.PathLike[str] | Bundle | Reference | None, device: str, threads: int | None, beside: Task
) -> Iterator[Side | None]:
    """Load the other side, if there is one; a bundle must be comparable with ``beside``.

    Raises what `load` raises, UsageError.
    """
    if what is None:
        yield None
    elif callable(what):
        described = getattr(what, "described", {"target": "a function"})
        yield Side(getattr(what, "name", "the reference"), what, dict(described))
    else:
        with open_task(what, device, threads) as task:
            check_comparable(beside.manifest, task.manifest)
            yield side_of(task)


def side_of(task: Task) -> Side:
    """An opened bundle as a side."""
    runtime, manifest = task.runtime, task.manifest
    described = runtime.describe()
    target = str(described["target"])
    engine = {
        **described,
        "device": device_of(target),
        "graphs": graphs_of(manifest, target, precision_of(engine_of(described))),
        "quantization": manifest.quantization.scheme if manifest.quantization is not None else "",
    }
    return Side(manifest.name, lambda feeds: run_batched(runtime, feeds), engine)


def run_side(side: Side, feeds: Feeds, batch: Sequence[Example], is_reference: bool = False) -> dict[str, Array]:
    """The side's outputs of a batch. Raises GateError where one is not finite: that is a failure, never a pass;
    BrokenReferenceError where it is the reference's.
    """
    outputs = dict(side.run(feeds))
    for name, array in outputs.items():
        if len(array) != len(batch):
            raise UsageError(
                f"{side.name} gave {len(array)} rows of {name!r} for {len(batch)} samples", "give a row a sample"
            )
        if not np.isfinite(array).all():
            bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
            gives = f"({side.name} on {side.engine['target']}) gives NaN or infinite values for"
            gives += f" {batch[int(np.argmax(bad))].name}"
            if is_reference:
                raise BrokenReferenceError(f"the reference {gives}", _BROKEN)
            raise GateError(f"the candidate {gives}", "such a model must not be shipped")
    return outputs


def check_alike(side: Side, outputs: Mapping[str, Array], candidate: Mapping[str, Array]) -> None:
    """Raise UsageError where the reference does not give what the ``candidate`` gave: arrays of other shapes would be
    compared after a fashion, and show nothing.
    """
    for name, array in candidate.items():
        if name not in outputs:
            raise UsageError(f"{side.name} gives no {name!r}, it gives {', '.join(outputs) or 'nothing'}", _SAME)
        if outputs[name].shape != array.shape:
            found, expected = list(outputs[name].shape), list(array.shape)
            raise UsageError(f"{side.name} gives {name!r} of shape {found}, the candidate {expected}", _SAME)


def check_comparable(one: Manifest, other: Manifest) -> None:
    """Raise UsageError unless both bundles do the same thing with the same inputs."""
    if one.task != other.task:
        raise UsageError(f"one bundle is of {one.task}, the other of {other.task}", "compare bundles of one checkpoint")
    if one.labels != other.labels:
        raise UsageError("the two bundles have different labels", "compare bundles of one checkpoint")
    if one.preprocessing != other.preprocessing:
        raise UsageError(
            "the two bundles prepare inputs differently", "compare bundles of one checkpoint, exported at one --shape"
        )
    for mine, theirs in zip(interface(one), interface(other), strict=True):
        shapes = [{spec.name: spec.shape[1:] for spec in specs} for specs in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise UsageError("the two bundles take or give different tensors", "compare bundles of one checkpoint")
