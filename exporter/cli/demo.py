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


def demo(
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Keep the bundle here; by default it goes to a temporary place."),
    ] = None,
    example: Annotated[str | None, typer.Option(help="The folder examples/fashion_mnist of the repository.")] = None,
) -> None:
    """The whole road on a small trained model and real pictures: export, inspect, run, validate, bench."""
    folder = _find_example(example)
    start = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="perceiver-export-demo-")) if output is None else None
    bundle = Path(output) if output is not None else (directory or Path()) / "fashion"
    try:
        _demo(folder, bundle)
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
    kept = f"The bundle is in {bundle}." if output is not None else "The bundle was temporary; keep it with -o BUNDLE."
    typer.echo(f"\nThe whole road took {time.monotonic() - start:.0f} s. {kept}")


def _demo(folder: Path, bundle: Path) -> None:
    from perceiver_export.calibration.validation import validate
    from perceiver_export.exporter.cli.bench import show_bench
    from perceiver_export.exporter.cli.export import show_export
    from perceiver_export.exporter.cli.inspect import show_inspection
    from perceiver_export.exporter.cli.run import run
    from perceiver_export.exporter.cli.validate import reference, show_validation
    from perceiver_export.exporter.inspection import inspect_bundle
    from perceiver_export.exporter.pipeline import export
    from perceiver_export.runtimes.benchmark import bench

    checkpoint, pictures, data = folder / "checkpoint", folder / "pictures", folder / "test.npz"
    _step(1, "export: a trained checkpoint becomes a bundle that needs no torch", f"export {checkpoint} -o {bundle}")
    with progress_bar("export") as progress:
        show_export(export(checkpoint, bundle, progress=progress), show_next=False)
    _step(2, "inspect: what is in it, and where the work is", f"inspect {bundle}")
    show_inspection(inspect_bundle(bundle))
    _step(3, "run: a few pictures of clothes", f"run {bundle} {pictures}")
    run(str(bundle), [str(pictures)])
    _step(
        4,
        "validate: the 10,000 official test pictures, against the checkpoint in torch",
        f"validate {bundle} --data {data} --against {checkpoint} --max-drop 0.1 --min-agreement 99.9",
    )
    with progress_bar("validate") as progress:
        result = validate(
            bundle,
            data,
            against=reference(str(bundle), str(checkpoint)),
            max_drop=0.1,
            min_agreement=99.9,
            progress=lambda done, total: progress("validate", done, total),
        )
    show_validation(bundle.name, result)
    result.require()
    _step(5, "bench: how fast, and how much memory", f"bench {bundle}")
    show_bench(bench(bundle, runs=200))


def _step(number: int, what: str, command: str) -> None:
    typer.echo("")
    typer.secho(f"{number}. {what}", bold=True)
    typer.secho(f"   $ perceiver-export {command}", dim=True)


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
