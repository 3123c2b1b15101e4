# SPDX-License-Identifier: Apache-2.0
"""Models of other packages, and three in plain torch (tests/zoo): folds, accuracy and speed of each export.

    python -m tests.benchmarks.zoo [--rounds 15] [--only NAME …]

Each row has the products that were recognized and folded, the FLOPs with and without folds, the difference from torch
in float32, the difference of the folded graph from the plain one in float64, the milliseconds of both on each engine in
turn, and the integer share of int8. A fold may add FLOPs if it moves fewer bytes: a byte counts as 10 FLOPs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tests.benchmarks.harness import Row, command, medians, seconds, seconds_in_turn
from tests.exporter.double import doubled, in_double
from tests.zoo.models import ZOO

_LEAST_SECONDS = 0.5  # of each side: a median of 15 calls of 0.3 ms was 20 % off
TARGETS = {"ONNX Runtime": "ort-cpu", "OpenVINO": "openvino-cpu"}


def measure(work: Path, rounds: int = 15, only: tuple[str, ...] = ("",)) -> Iterator[Row]:
    from perceiver_export.calibration import QuantizeOptions, quantize
    from perceiver_export.exporter import ExportOptions, OwnModel, export
    from perceiver_export.runtimes.errors import PerceiverExportError

    for name in ZOO if only == ("",) else only:
        module, inputs = ZOO[name]()
        own = OwnModel(module, inputs)
        try:
            plain, folded = (export(own, work / f"{name}-{fold}", ExportOptions(fold=fold)) for fold in (False, True))
        except PerceiverExportError as error:
            yield {"model": name, "refused": error.message}
            continue

        parts = [one.manifest.parts["model"] for one in (plain, folded)]
        mflop = [sum(stage.flops for stage in part.stages) / 1e6 for part in parts]
        feeds = {key: value.numpy() for key, value in inputs.items()}
        folds = Counter("blocked" if one.why.startswith("blocked") else one.chosen for one in parts[1].folds)
        try:
            made = quantize(folded, "random", work / f"{name}-int8", QuantizeOptions(samples=2, min_coverage=0))
            share = getattr(made.manifest.quantization, "integer_share", None)
        except PerceiverExportError as error:
            share = error.message.partition(":")[0]
        yield {
            "model": name,
            "folded": folds["folded"],
            "does not pay": folds["plain"],
            "blocked": folds["blocked"],
            "MFLOP plain": mflop[0],
            "MFLOP folded": mflop[1],
            "difference to torch": max(one.difference for one in folded.manifest.verification),
            "float64 error": exact_error(module, inputs),
            "ms plain, folded": _times(plain.path, folded.path, feeds, rounds),
            "integer share": share,
        }


def _times(plain: Path, folded: Path, feeds: Mapping[str, np.ndarray], rounds: int) -> dict[str, list[float]]:
    """Median milliseconds of both graphs by engine."""
    from perceiver_export.runtimes import load

    found = {}
    for engine, target in TARGETS.items():
        with load(plain, target) as one, load(folded, target) as other:
            sides = {"plain": lambda run=one.run: run(feeds), "folded": lambda run=other.run: run(feeds)}
            enough = round(_LEAST_SECONDS / seconds(sides["folded"]))
            times = medians(seconds_in_turn(sides, max(rounds, enough)))
        found[engine] = [1e3 * times["plain"], 1e3 * times["folded"]]
    return found


def exact_error(module: object, inputs: Mapping[str, object]) -> float:
    """The largest difference of the folded graph from the plain one in float64, as a share of the output's scale."""
    from onnx.reference import ReferenceEvaluator

    from perceiver_export.exporter.fold.engine import fold
    from perceiver_export.exporter.graphs import own_graph
    from perceiver_export.exporter.own import NamedModule
    from perceiver_export.exporter.trace import folded_graph

    part = own_graph(NamedModule(module, inputs), None)  # type: ignore[arg-type]
    model = folded_graph(part, None, False, 1 << 40).model
    feeds = {name: doubled(array) for name, array in part.examples.items()}
    outputs = []
    in_double(model)
    for folds in (False, True):
        if folds:
            fold(model)
        proto = ir.to_proto(model)
        outputs.append(ReferenceEvaluator(proto).run(None, feeds))
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*outputs, strict=True))


if __name__ == "__main__":
    command(measure)
