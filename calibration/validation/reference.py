# SPDX-License-Identifier: Apache-2.0
"""The two sides of a comparison: a bundle on a target, and another bundle or a function such as the PyTorch model.

Also warnings about a reference, and checks whether it can support a certificate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perceiver_export.calibration.data.samples import Example
from perceiver_export.calibration.validation.options import Reference
from perceiver_export.runtimes.bundle import BundleLike
from perceiver_export.runtimes.certificates import device_of, engine_of, precision_of
from perceiver_export.runtimes.engines.cache import graphs_of
from perceiver_export.runtimes.errors import BrokenReferenceError, GateError, UsageError
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks import open_task
from perceiver_export.runtimes.tasks.base import Task, interface, run_batched

Described = Mapping[str, Any]  # `Side.described`

_HINT = "give the fp32 bundle that it was made from, or the checkpoint: --against BUNDLE or --against CHECKPOINT"


@dataclass(frozen=True)
class Side:
    """One of the two sides.

    ``described``: its ``name``, its engine (`Runtime.describe`), the ``device``'s name, the SHA-256 by file of the
    ``graphs`` that run, and the scheme of its ``quantization``, empty if it has none.
    """

    run: Reference
    described: dict[str, Any]


@contextlib.contextmanager
def open_side(
    what: BundleLike | Reference | None, device: str, threads: int | None, beside: Task
) -> Iterator[Side | None]:
    """Open the reference, a function or a bundle in fp32; yield None if there is no reference.

    Raises the errors of `load`, and UsageError unless the bundle is comparable to ``beside``.
    """
    if what is None:
        yield None
    elif callable(what):
        name = getattr(what, "name", "the reference")
        yield Side(what, {"name": name, **getattr(what, "described", {"target": "a function"})})
    else:
        with open_task(what, device, threads, precision="fp32") as task:
            _check_comparable(beside.manifest, task.manifest)
            yield side_of(task)


def side_of(task: Task) -> Side:
    """An open bundle as a side."""
    runtime, manifest = task.runtime, task.manifest
    engine = runtime.describe()
    target = str(engine["target"])
    described = {
        "name": manifest.name,
        **engine,
        "device": device_of(target),
        "graphs": graphs_of(manifest, target, precision_of(engine_of(engine))),
        "quantization": manifest.quantization.scheme if manifest.quantization is not None else "",
    }
    return Side(lambda feeds: run_batched(runtime, feeds), described)


def run_sides(
    candidate: Side, reference: Side | None, feeds: Feeds, batch: Sequence[Example]
) -> tuple[Mapping[str, Array], Mapping[str, Array] | None]:
    """The outputs of both sides for a batch.

    Raises UsageError if the reference's outputs have other names or shapes; BrokenReferenceError if they are not
    finite; GateError if only the candidate's are not.
    """
    outputs, expected = candidate.run(feeds), None if reference is None else reference.run(feeds)
    if reference is not None and expected is not None:
        shapes = [{name: list(array.shape) for name, array in side.items()} for side in (outputs, expected)]
        if not shapes[0].items() <= shapes[1].items():
            said = f"{reference.described['name']} gives {shapes[1]}, the candidate {shapes[0]}"
            raise UsageError(said, "return the same outputs as the bundle, by name, one row per sample")
        _check_finite("reference", reference, {name: expected[name] for name in outputs}, batch)
    _check_finite("candidate", candidate, outputs, batch)
    return outputs, expected


def _check_finite(role: str, side: Side, outputs: Mapping[str, Array], batch: Sequence[Example]) -> None:
    for array in outputs.values():
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            place = "{name} on {target}".format_map(side.described)
            said = f"the {role} ({place}) gives NaN or infinite values for {batch[int(np.argmin(finite))].name}"
            if role == "candidate":
                raise GateError(said, "do not ship this model")
            raise BrokenReferenceError(said, "check that sample and the model, or give another reference")


def _check_comparable(one: Manifest, other: Manifest) -> None:
    """Raise UsageError unless both bundles do the same task with the same inputs."""
    compared: dict[str, Callable[[Manifest], Any]] = {
        "tasks": lambda manifest: manifest.task,
        "labels": lambda manifest: manifest.labels,
        "preprocessing": lambda manifest: manifest.preprocessing,
        "inputs or outputs": lambda manifest: [{s.name: s.shape[1:] for s in specs} for specs in interface(manifest)],
    }
    for what, of in compared.items():
        if of(one) != of(other):
            hint = "compare bundles of the same checkpoint, exported with the same --shape"
            raise UsageError(f"the two bundles have different {what}", hint)


def doubts(candidate: Described, reference: Described | None) -> dict[str, str]:
    """Warnings by kind: ``itself`` if both sides are the same; ``quantized`` if the reference is itself quantized."""
    places = [
        (side.get("target"), engine_of(side), sorted(side.get("graphs", {}).values()))
        for side in (candidate, reference or {})
    ]
    if places[0][2] and places[0] == places[1]:
        said = f"the reference is the candidate itself, the same graphs on {candidate['target']}: nothing was compared"
        return {"itself": said}
    if reference is not None and reference.get("quantization"):
        scheme = reference["quantization"]
        return {"quantized": f"the reference is itself quantized ({scheme}): its own loss is not measured"}
    return {}


def check_reference(candidate: Described, reference: Described | None) -> None:
    """Raise UsageError if this reference cannot support a certificate.

    That is no reference, the candidate itself, a quantized one, or a function without a hash. Float graphs of other
    targets, also in fp16 or bf16, are allowed; the certificate names them.
    """
    why = list(doubts(candidate, reference).values())
    if reference is None:
        why = ["there is no reference"]
    elif not reference.get("graphs"):
        why.append(f"the reference, {reference.get('target')}, has no hash that identifies it")
    if why:
        raise UsageError(f"nothing can be certified: {why[0]}", _HINT)
