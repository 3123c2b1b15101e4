# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export export`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from perceiver_export.exporter.budget import DEFAULT_BUDGET
from perceiver_export.exporter.cli.output import JsonFlag, count, mebibytes, print_json, progress_bar, shape
from perceiver_export.exporter.cli.run import INPUTS
from perceiver_export.runtimes.errors import UsageError

if TYPE_CHECKING:
    from perceiver_export.runtimes.bundle import Bundle
    from perceiver_export.runtimes.manifest import Part


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Hugging Face directory, deepmind:TASK:FILE, krasserm:FILE, lucidrains:FILE, preset:NAME, or "
            "module:function that gives your own model.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="BUNDLE", help="Where the bundle goes.")],
    task: Annotated[str | None, typer.Option(help="What the model does, where the checkpoint does not tell.")] = None,
    parity: Annotated[
        str | None,
        typer.Option(help="Whose numerics to follow: huggingface or deepmind. By default those of the checkpoint."),
    ] = None,
    split: Annotated[
        bool | None,
        typer.Option(
            "--split/--no-split",
            help="Encoder and decoder apart, to decode only what is needed. By default for video only.",
        ),
    ] = None,
    dynamic_queries: Annotated[
        bool, typer.Option("--dynamic-queries", help="Decoders take any number of queries a call.")
    ] = False,
    batch: Annotated[str, typer.Option(metavar="N|MIN:OPT:MAX", help="Samples a call: fixed, or a range.")] = "1",
    shape_: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME=…", help="Fix a size, e.g. image=3x224x224 or queries=1024."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="Sizes of a state dict that does not tell them.")
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Leave out the work that constant latents and positions save.")
    ] = True,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Activations that a run may need; larger stages run in pieces.",
            show_default=DEFAULT_BUDGET,
        ),
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
            source,
            output,
            task=task,
            parity=parity,
            split=split,
            dynamic_queries=dynamic_queries,
            batch=batch,
            shape=sizes,
            config=config,
            fold=fold,
            memory_budget=memory_budget,
            overwrite=overwrite,
            progress=progress,
        )
    manifest = bundle.manifest
    if json:
        print_json({"bundle": str(bundle.path), "manifest": manifest})
        return
    show_export(bundle)


def show_export(bundle: Bundle, show_next: bool = True) -> None:
    """What was written, what was assumed, and the commands to type next."""
    manifest = bundle.manifest
    worst = max(manifest.verification, key=lambda check: check.difference)
    size = sum(entry.size for entry in manifest.files.values())
    typer.echo(f"exported {manifest.source} to {bundle.path} ({mebibytes(size)})")
    for name, part in manifest.parts.items():
        if bundle.split:
            typer.echo(f"part {name}")
        for spec in (*part.inputs, *part.outputs):
            meaning = f", {spec.meaning}" if spec.meaning else ""
            typer.echo(f"  {spec.name}: {spec.dtype} {shape(spec.shape)}{meaning}")
        typer.echo(f"  work: {count(sum(stage.flops for stage in part.stages))}FLOP {_once(part)}{_folded(part)}")
    typer.echo(
        f"  verified against torch in {len(manifest.verification)} comparisons: largest difference "
        f"{worst.difference:.1e} of the output's scale ({worst.tolerance:.0e} allowed)"
    )
    for note in manifest.notes:
        typer.echo(typer.style("note:", fg="yellow", bold=True) + f" {note}")
    if not show_next:
        return
    path = shlex.quote(str(bundle.path))
    typer.echo(f"next: perceiver-export run {path} {INPUTS.get(manifest.task, 'INPUT…')}")
    if manifest.task == "image-classification":
        typer.echo(f"      perceiver-export validate {path} --data DATA")


def _folded(part: Part) -> str:
    folded = sum(one.chosen == "folded" for one in part.folds)
    return f", {folded} of {len(part.folds)} sites folded: see inspect" if part.folds else ""


def _once(part: Part) -> str:
    return "a sample" if part.num_queries is None else "a call"


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
