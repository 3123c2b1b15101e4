# SPDX-License-Identifier: Apache-2.0
"""What a server needs to know of a bundle's parts, and how it had best be set up, by what `bench --save` measured."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.manifest import Part, TensorSpec
from perceiver_export.runtimes.report import read_report

_QUEUE_DELAY = 2000  # microseconds that a request may wait for company where nothing was measured
_WORTH_IT = 1.1  # a second instance is started where two requests at once gave a tenth more


@dataclass(frozen=True)
class Settings:
    """``instances`` to start, ``delay`` in microseconds that a batch waits to fill, and where the two come from."""

    instances: int
    delay: int
    source: str


@dataclass(frozen=True)
class ServedPart:
    """One graph as a server sees it. ``batch`` is (least, most) where the first axis is a range, else None."""

    name: str
    part: Part
    graph: str
    batch: tuple[int, int] | None

    def dims(self, spec: TensorSpec) -> list[int]:
        """The shape, -1 where it is dynamic."""
        return [dim if isinstance(dim, int) else -1 for dim in spec.shape]


def served_name(bundle: Bundle) -> str:
    """The bundle's name in a-z, 0-9 and -, 40 letters of it. Raises UsageError where nothing is left."""
    name = re.sub(r"[^a-z0-9]+", "-", bundle.manifest.name.lower()).strip("-")[:40].strip("-")
    if not name:
        raise UsageError(
            f"{bundle.manifest.name!r} is no name for a served model", "export to a directory named in a-z, 0-9 and -"
        )
    return name


def served_parts(bundle: Bundle, target: str) -> tuple[ServedPart, ...]:
    """Every part with a name that file systems, URLs and Kubernetes all take."""
    base = served_name(bundle)
    served = []
    for name, part in bundle.manifest.parts.items():
        full = base if len(bundle.manifest.parts) == 1 else f"{base}-{name.replace('_', '-')}"
        served.append(ServedPart(full, part, part.graph_for(target), _batch(part)))
    return tuple(served)


def settings(bundle: Bundle, target: str) -> Settings:
    """From the bundle's report, whatever machine it was measured on; careful defaults without one."""
    for machine, targets in read_report(bundle.path).get("bench", {}).items():
        measured: dict[str, Any] = targets.get(target, {})
        if {"p50", "throughput", "batch"} <= measured.keys():
            alone = 1e3 * measured["batch"] / measured["p50"]
            instances = 2 if measured["throughput"] >= _WORTH_IT * alone else 1
            delay = int(min(max(measured["p50"] * 1e3 / 2, 100), 20_000))
            return Settings(instances, delay, f"report.json: {measured['p50']:.2f} ms a call on {machine}")
    return Settings(1, _QUEUE_DELAY, "not measured: run `perceiver-export bench BUNDLE --save` where it will serve")


def copy_graph(bundle: Bundle, served: ServedPart, directory: Path) -> None:
    """The graph as model.onnx, with those weights beside it that it names, under the name that it knows them by."""
    directory.mkdir(parents=True)
    shutil.copyfile(bundle.file(served.graph), directory / "model.onnx")
    # Names of files are in a graph as they are written, and to look for them needs no onnx here.
    graph = (directory / "model.onnx").read_bytes()
    for name in bundle.manifest.files:
        if not name.endswith((".onnx", ".npz", ".json")) and name.encode() in graph:
            shutil.copyfile(bundle.file(name), directory / name)


def _batch(part: Part) -> tuple[int, int] | None:
    specs = (*part.inputs, *part.outputs)
    first = specs[0].shape[0] if specs[0].shape else 0
    same = all(spec.shape and spec.shape[0] == first for spec in specs)
    return specs[0].ranges[first] if same and isinstance(first, str) else None
