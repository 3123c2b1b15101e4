# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export demo`."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from perceiver_export.exporter.cli.output import progress_bar
from perceiver_export.runtimes.errors import DataError

_EXAMPLE = Path("examples/fashion_mnist")
_MAX_DROP, _AGREEMENT = 0.6, 97.0


def demo(
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Keep the bundles (this name, and with -int8) and the report."),
    ] = None,
    example: Annotated[str | None, typer.Option(help="The folder examples/fashion_mnist of the repository.")] = None,
) -> None:
    """The whole road on a small trained model and real pictures: from a checkpoint to a certified int8 bundle."""
    folder = _find_example(example)
    steps = _Steps()
    directory = Path(tempfile.mkdtemp(prefix="perceiver-export-demo-")) if output is None else None
    bundle = Path(output) if output is not None else (directory or Path()) / "fashion"
    quantized, report = (bundle.with_name(f"{bundle.name}{ending}") for ending in ("-int8", "-report.html"))
    if directory is not None:
        typer.echo(f"What is made lies in {directory} and is removed at the end; -o BUNDLE keeps it.")
    try:
        _export(folder, bundle, steps)
        _quantize(folder, bundle, quantized, report, steps)
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
    kept = f"Kept: {bundle}, {quantized}, {report}." if output else "Nothing was kept; -o BUNDLE keeps it."
    typer.echo(f"\n{steps.times()}\n{kept}")


class _Steps:
    """Announces each step, and knows in the end how long each took."""

    def __init__(self) -> None:
        self._begun: list[tuple[str, float]] = []

    def begin(self, what: str, command: str) -> None:
        """``what`` is the command's name, a colon, and what it does."""
        self._begun.append((what.partition(":")[0], time.monotonic()))
        typer.echo("")
        typer.secho(f"{len(self._begun)}. {what}", bold=True)
        typer.secho(f"   $ perceiver-export {command}", dim=True)

    def times(self) -> str:
        """The time of each step and of all, in seconds."""
        names, begins = zip(*self._begun, strict=True)
        ends = (*begins[1:], time.monotonic())
        each = (f"{name} {end - begin:.0f} s" for name, begin, end in zip(names, begins, ends, strict=True))
        return f"The whole road took {ends[-1] - begins[0]:.0f} s: {', '.join(each)}."


def _export(folder: Path, bundle: Path, steps: _Steps) -> None:
    from perceiver_export.exporter.cli.export import show_export
    from perceiver_export.exporter.cli.inspect import show_inspection
    from perceiver_export.exporter.cli.run import run
    from perceiver_export.exporter.inspection import inspect_bundle
    from perceiver_export.exporter.pipeline import export

    checkpoint, pictures = folder / "checkpoint", folder / "pictures"
    steps.begin("export: a trained checkpoint becomes a bundle that needs no torch", f"export {checkpoint} -o {bundle}")
    with progress_bar("export") as progress:
        show_export(export(checkpoint, bundle, progress=progress), show_next=False)
    steps.begin("inspect: what is in it, and where the work is", f"inspect {bundle}")
    show_inspection(inspect_bundle(bundle))
    steps.begin("run: a few pictures of clothes", f"run {bundle} {pictures}")
    run(str(bundle), [str(pictures)])


def _quantize(folder: Path, bundle: Path, quantized: Path, report: Path, steps: _Steps) -> None:
    from perceiver_export.calibration.pipeline import quantize
    from perceiver_export.calibration.record import read_calibration
    from perceiver_export.exporter.cli.bench import show_bench
    from perceiver_export.exporter.cli.quantize import show_quantized
    from perceiver_export.exporter.cli.validate import validate
    from perceiver_export.runtimes.benchmark import bench

    held_out, data = folder / "held_out.npz", folder / "test.npz"
    command = f"quantize {bundle} --data {held_out} -o {quantized}"
    steps.begin("quantize: int8, calibrated on pictures held out of training", command)
    with progress_bar("quantize") as progress:
        made = quantize(bundle, held_out, quantized, progress=progress)
    record = read_calibration(made)
    assert record is not None
    show_quantized(made, record)
    steps.begin(
        "validate: the 10,000 official test pictures on every engine that is here, against the fp32 bundle, which "
        "export held against torch; a certificate for each, and a report",
        f"validate {quantized} --data {data} --against {bundle} --device all --max-drop {_MAX_DROP}"
        f" --min-agreement {_AGREEMENT} --certify --report {report}",
    )
    validate(
        str(quantized),
        str(data),
        against=str(bundle),
        max_drop=_MAX_DROP,
        min_agreement=_AGREEMENT,
        device="all",
        certify=True,
        report=str(report),
    )
    typer.echo(f"report: {report} ({report.stat().st_size / 1024:.0f} KiB, opens anywhere)")
    steps.begin("bench: int8 and fp32 in turn", f"bench {quantized} --against {bundle}")
    show_bench(bench(quantized, against=bundle, runs=200))


def _find_example(given: str | None) -> Path:
    """The example's folder: the one given, or the one of the repository that this was installed from or is run in."""
    source = Path(__file__).resolve().parents[2]  # an editable install keeps links to the checkout
    candidates = [Path(given)] if given is not None else [_EXAMPLE, source / _EXAMPLE]
    for folder in candidates:
        if (folder / "checkpoint" / "config.json").is_file():
            return folder
    raise DataError(
        f"the demo's model and pictures are not at {candidates[0]}",
        "they are not in the wheel: run it in a clone of the repository, or give --example FOLDER",
    )
