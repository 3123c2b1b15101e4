# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perceiver_export.exporter.cli.output import (
    BundleArgument,
    DeviceOption,
    JsonFlag,
    ThreadsOption,
    print_json,
    print_table,
    progress_bar,
)

if TYPE_CHECKING:
    from perceiver_export.calibration.validation import Reference, Validation


def validate(
    bundle: BundleArgument,
    data: Annotated[str, typer.Option(help="Pictures with labels.csv or class folders, .npz, or module:function.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="BUNDLE0|SOURCE", help="Reference: another bundle, or the checkpoint in torch."),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Largest fall of top-1 below the reference, in points.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Least lower 95 % bound of agreement with the reference, in percent.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Stop after so many samples.")] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Measure top-1, and agreement with a reference, with exact 95 % bounds; exit 1 where a gate does not hold."""
    from perceiver_export.calibration.validation import validate as validate_

    with progress_bar("validate", quiet=json) as progress:
        result = validate_(
            bundle,
            data,
            against=None if against is None else reference(bundle, against),
            max_drop=max_drop,
            min_agreement=min_agreement,
            samples=samples,
            device=device,
            threads=threads,
            progress=lambda done, total: progress("validate", done, total),
        )
    if json:
        print_json(result)
    else:
        show_validation(bundle, result)
    result.require()


def reference(bundle: str, against: str) -> str | Reference:
    """``--against`` as `validate` takes it: a bundle by its path, a checkpoint as a function that runs it in torch."""
    if (Path(against) / "manifest.json").is_file():
        return against
    from perceiver_export.exporter.load import load_model
    from perceiver_export.runtimes.bundle import read_manifest
    from perceiver_export.runtimes.errors import UsageError
    from perceiver_export.runtimes.preprocessing import ImagePreprocessing

    manifest = read_manifest(Path(bundle))
    steps = manifest.preprocessing
    if not isinstance(steps, ImagePreprocessing):
        raise UsageError(f"{bundle} is of {manifest.task}", "a checkpoint can be the reference of an image classifier")
    loaded = load_model(against, parity=manifest.parity, shape={"image": (3, steps.height, steps.width)})
    if (loaded.labels, loaded.preprocessing) != (manifest.labels, manifest.preprocessing):
        raise UsageError(
            f"{against} prepares pictures differently from {bundle}, or has other labels",
            "give the checkpoint that the bundle was exported from",
        )
    return lambda pictures: loaded.run({"image": pictures})["logits"]


def show_validation(name: str, result: Validation) -> None:
    """The result as a table, the gates below it."""
    rows = []
    if result.top1 is not None:
        rows.append(("top-1", str(result.top1)))
    if result.reference_top1 is not None:
        rows.append(("top-1 of the reference", str(result.reference_top1)))
    if result.drop is not None:
        rows.append(("drop", f"{result.drop:+.2f} points"))
    if result.agreement is not None:
        rows.append(("agreement with the reference", str(result.agreement)))
    if not rows:
        rows.append(("outputs", "all finite; no labels and no reference to measure against"))
    print_table(f"{name} on {result.samples:,} sample{'s' if result.samples != 1 else ''}", ["", "measured"], rows)
    for gate in result.gates:
        if gate.held:  # one that does not is the error that follows
            typer.echo(str(gate))
