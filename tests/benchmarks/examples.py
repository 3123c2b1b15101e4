# SPDX-License-Identifier: Apache-2.0
"""The trained examples (examples/*/demo.json): accuracy, size, time and memory in each precision on each engine.

    python -m tests.benchmarks.examples [NAME …]

Accuracy is measured on the example's test data. The loss is paired with fp32 on the first engine, with 95 % bounds
(lower, upper); the upper bound is the smallest margin that these samples can certify. ms: the median of one call. MiB:
the files of the bundle, and the peak resident size of a fresh process. Certificate: the example's gates, as decided by
`validate --certify`. The baseline is measured by train.py --baseline on the same test data.

The second table has each metric of the demo's validations, on the first engine, with 95 % bounds: a quality compares
with the targets, a likeness with fp32. The third table has further figures that commands of the examples print, one
JSON object per line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from perceiver_export.calibration import Gates, ValidateOptions, Validation, certify, validate
from perceiver_export.calibration.validation.gates import MARKS
from perceiver_export.calibration.validation.statistics import Estimate
from perceiver_export.exporter.cli.demo import Example, find_examples, read_example, step_command
from perceiver_export.exporter.cli.main import app
from perceiver_export.runtimes import Bundle, open_bundle
from perceiver_export.runtimes.benchmark import bench
from perceiver_export.runtimes.engines.backend import find_target
from perceiver_export.runtimes.errors import PerceiverExportError
from perceiver_export.runtimes.presence import devices
from tests.benchmarks.harness import REPOSITORY, Row, command

FURTHER = {
    "flow": ("flow.train --baseline", "flow.picture {out}/flow -o {out}/flow.svg"),
    "multitask": ("multitask.train --baseline turn", "multitask.train --baseline upright"),
    "policy": ("policy.closed_loop {out}/policy {out}/policy-int8 --episodes 300 --json",),
    "speech": ("speech.train --voice it_IT_f_Menardi",),
    "video": ("video.train --baseline",),
}


def measure(work: Path, names: tuple[str, ...] = ("",)) -> Iterator[Row]:
    found = [folder for folder in find_examples() if names == ("",) or folder.name in names]
    for folder in found:
        yield from rows(folder, work / folder.name)
    for folder in found:
        yield from all_metrics(folder, work / folder.name)
    for folder in found:
        for words in FURTHER.get(folder.name, ()):
            out = str(work / folder.name)
            for line in run_own(words.format(out=out)).replace(out, "{out}").splitlines():
                said = json.loads(line) if line.startswith("{") else line
                yield {"example": folder.name, "command": f"python -m examples.{words}", "printed": said}


def rows(folder: Path, out: Path) -> Iterator[Row]:
    """The example in fp32, bf16 where the CPU has it, int8 and int8 weights; and the baseline."""
    example = read_example(folder)
    bundles = made(folder, example, out)
    targets, gates = [device.target for device in devices()], gates_of(example, folder)
    for name, bundle in bundles.items():
        for target in targets:
            halves = find_target(target).backend().precisions(target) if name == "fp32" else ()
            for precision in (None, *(one for one in halves if one == "bf16")):
                options = ValidateOptions(device=target, precision=precision, gates=Gates(metric=gates.metric))
                if (name, target, precision) != ("fp32", targets[0], None):
                    reference: dict[str, Any] = {
                        "against": bundles["fp32"],
                        "against_device": targets[0],
                        "gates": gates,
                    }
                    options = dataclasses.replace(options, **reference)
                yield {"example": folder.name, "precision": precision or name, **row(folder, example, bundle, options)}
    yield {"example": folder.name, "precision": "baseline", **baseline(folder)}


def made(folder: Path, example: Example, out: Path) -> dict[str, Bundle]:
    """The bundles from the demo's steps, and one with int8 weights."""
    for step in example.steps:
        words = step_command(step, folder, out)
        if words[0] not in ("export", "quantize"):
            continue
        output = words.index("-o") + 1
        weights = [*words[:output], str(out / "int8-weights"), *words[output + 1 :], "--scheme", "int8-weights"]
        for typed in (words, weights)[: 1 + (words[0] == "quantize")]:
            if not Path(typed[output]).exists():
                with contextlib.redirect_stdout(sys.stderr):
                    app(typed, standalone_mode=False)
    names = {"fp32": example.bundle, "int8": example.quantized, "int8 weights": "int8-weights"}
    return {precision: open_bundle(out / name) for precision, name in names.items()}


def gates_of(example: Example, folder: Path) -> Gates:
    """The gates in the form that `validate` takes."""
    words = [word.format(example=folder) for word in shlex.split(example.gates)]
    given: dict[str, Any] = {
        option.removeprefix("--").replace("-", "_"): float(value)
        if option in ("--max-drop", "--min-agreement")
        else value
        for option, value in zip(words[::2], words[1::2], strict=True)
    }
    return Gates(**given)


def row(folder: Path, example: Example, bundle: Bundle, options: ValidateOptions) -> Row:
    """One bundle on one engine."""
    data = folder / example.test
    found = validate(bundle, str(data) if data.exists() else example.test, options)
    metric = next((one for one in found.metrics if options.gates.metric in (None, one.name)), None)
    (timed,) = bench(bundle.path, device=options.device, precision=options.precision).measurements
    loss = None if metric is None else metric.worsening
    return {
        "engine": options.device,
        "metric": "–" if metric is None else f"{metric.name} {metric.candidate.value:.4g} {metric.unit}".strip(),
        "loss": "–" if loss is None else f"{loss.value:.3g} ({loss.lower:.3g}, {loss.upper:.3g})",
        "samples": found.samples,
        "ms": timed.p50,
        "MiB of files": bundle.num_bytes / 2**20,
        "peak MiB": timed.peak_memory,
        "certificate": verdict(bundle, found) if options.against is not None else "–",
    }


def verdict(bundle: Bundle, found: Validation) -> str:
    """The outcomes of the gates, and the reason if they hold but there is no certificate."""
    said = "; ".join(f"{MARKS[gate.outcome]} {gate.wanted}" for gate in found.gates)
    if not found.held:
        return said
    try:
        certify(bundle, [found])
    except PerceiverExportError as error:
        return f"{said}; none: {error.message}"
    return said


def all_metrics(folder: Path, out: Path) -> Iterator[Row]:
    """Every metric of the demo's validations of int8, on the first engine."""
    example, seen = read_example(folder), set[str]()
    bundles = made(folder, example, out)
    for step in example.steps:
        words = step_command(step, folder, out)
        if words[0] != "validate":
            continue
        given = dict(pairwise(words))
        options = ValidateOptions(against=bundles["fp32"], gates=Gates(metric=given.get("--metric")))
        found = validate(bundles["int8"], given["--data"], options)
        for one in found.metrics:
            if one.name not in seen:
                sides = {"fp32": one.reference, "int8": one.candidate, "int8 is worse by": one.worsening}
                named = f"{one.name} of {one.of}" + f", {one.unit}" * bool(one.unit)
                yield {"example": folder.name, "metric": named} | {name: bounded(side) for name, side in sides.items()}
            seen.add(one.name)


def bounded(found: Estimate | None) -> str:
    """The value and its bounds."""
    return "–" if found is None else f"{found.value:.4g} ({found.lower:.4g} to {found.upper:.4g})"


def baseline(folder: Path) -> Row:
    """The last line that train.py --baseline prints, in the columns of the other rows."""
    said = run_own(f"{folder.name}.train --baseline")
    empty = dict.fromkeys(("loss", "samples", "ms", "MiB of files", "peak MiB", "certificate"), "–")
    if said.startswith("not measured"):
        return {"engine": "–", "metric": said, **empty}
    last = json.loads(said.splitlines()[-1])
    return {"engine": last["baseline"], "metric": f"{last['metric']} {last['value']:.4g}", **empty}


def run_own(words: str) -> str:
    """The output of a command of the examples, or the reason why it failed."""
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(f"examples.{words}")],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
    )
    if done.returncode:
        return f"not measured: {done.stderr.strip().splitlines()[-1:]}"
    return done.stdout.strip()


if __name__ == "__main__":
    command(measure)
