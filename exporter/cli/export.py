# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from perceiver_export.exporter.cli.output import JsonFlag, count, mebibytes, print_json, progress_bar, shape
from perceiver_export.runtimes.errors import UsageError

if TYPE_CHECKING:
    from perceiver_export.runtimes.bundle import Bundle


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A Hugging Face directory, or preset:NAME.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="BUNDLE", help="Where the bundle goes.")],
    task: Annotated[str | None, typer.Option(help="What the model does, where the checkpoint does not tell.")] = None,
    parity: Annotated[str | None, typer.Option(help="Whose numerics to follow: huggingface.")] = None,
    batch: Annotated[str, typer.Option(metavar="N|MIN:OPT:MAX", help="Pictures a call: fixed, or a range.")] = "1",
    shape_: Annotated[
        list[str] | None, typer.Option("--shape", metavar="NAME=…", help="Fix an input's size, e.g. image=3x224x224.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is already there.")] = False,
    json: JsonFlag = False,
) -> None:
    """Export a checkpoint to a bundle: trace, bake constants, compare with torch, write.

    Nothing is written unless the graph gives what torch gives.
    """
    from perceiver_export.exporter.pipeline import export as export_

    sizes = dict(_parse_shape(text) for text in shape_ or ())
    with progress_bar("export", quiet=json) as progress:
        bundle = export_(
            source, output, task=task, parity=parity, batch=batch, shape=sizes, overwrite=overwrite, progress=progress
        )
    manifest = bundle.manifest
    if json:
        print_json({"bundle": str(bundle.path), "manifest": manifest})
        return
    show_export(bundle)


def show_export(bundle: Bundle, show_next: bool = True) -> None:
    """What was written, what was assumed, and the commands to type next."""
    manifest = bundle.manifest
    part = bundle.part()
    worst = max(manifest.verification, key=lambda check: check.difference)
    size = sum(entry.size for entry in manifest.files.values())
    typer.echo(f"exported {manifest.source} to {bundle.path} ({mebibytes(size)})")
    for spec in (*part.inputs, *part.outputs):
        typer.echo(f"  {spec.name}: {spec.dtype} {shape(spec.shape)}, {spec.meaning}")
    typer.echo(f"  work: {count(sum(stage.flops for stage in part.stages))}FLOP a picture")
    typer.echo(
        f"  verified against torch on {len(manifest.verification)} seeds: largest difference {worst.difference:.1e} "
        f"of the output's scale ({worst.tolerance:.0e} allowed)"
    )
    for note in manifest.notes:
        typer.echo(typer.style("note:", fg="yellow", bold=True) + f" {note}")
    if not show_next:
        return
    typer.echo(f"next: perceiver-export run {bundle.path} PICTURE…")
    typer.echo(f"      perceiver-export validate {bundle.path} --data DATA")


def _parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """``image=3x224x224`` -> ("image", (3, 224, 224)). Raises UsageError."""
    name, equals, dims = text.partition("=")
    try:
        sizes = tuple(int(dim) for dim in dims.replace(",", "x").split("x"))
    except ValueError:
        sizes = ()
    if not equals or not sizes:
        raise UsageError(f"--shape {text!r} is not NAME=SIZE", "for example --shape image=3x224x224")
    return name, sizes
