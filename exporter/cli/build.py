# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export build`."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Annotated, cast

import typer

from perceiver_export.exporter.cli.output import BundleArgument, JsonFlag, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from perceiver_export.calibration.lowering.tensorrt_bundle import Lowered
    from perceiver_export.runtimes.building import BuiltEngine
    from perceiver_export.runtimes.engines.backend import Hint, Precision


def build(
    bundle: BundleArgument,
    target: Annotated[list[str], typer.Option(help="Target to compile for; may be given more than once.")],
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16, where the target has a choice.")] = "fp32",
    hint: Annotated[str, typer.Option(help="latency: one answer soon; throughput: many answers.")] = "latency",
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NAME=LEAST:BEST:MOST", help="Sizes of a named dimension.")
    ] = None,
    flag: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of the target's own engine.")
    ] = None,
    lower_only: Annotated[
        bool, typer.Option("--lower-only", help="Rewrite the graph for the target, but do not compile it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Compile again even if a valid engine is there.")] = False,
    json: JsonFlag = False,
) -> None:
    """Compile a bundle for targets, on the device that will run it."""
    from perceiver_export.runtimes.building import build as build_

    sizes, flags = _sizes(shape or []), dict(_pair(text, "--flag") for text in flag or [])
    built: list[BuiltEngine] = []
    lowered: list[Lowered] = []
    with progress_bar("build", quiet=json) as progress:
        for name in target:
            if lower_only:
                lowered += _lower(bundle, name, cast("Precision", precision))
            else:
                built += build_(
                    bundle,
                    name,
                    precision=cast("Precision", precision),
                    hint=cast("Hint", hint),
                    shapes=sizes,
                    flags=flags,
                    force=force,
                    progress=progress,
                )
    if json:
        print_json(lowered or [{**dataclasses.asdict(one), "directory": str(one.directory)} for one in built])
    elif lower_only:
        _show_lowered(lowered)
    else:
        _show(bundle, built, flags.get("compute_capability", ""))


def _show(bundle: str, built: list[BuiltEngine], crossed: str) -> None:
    rows = [
        (
            one.target,
            one.part,
            *(("compiled", f"{one.seconds:.1f}") if one.new else ("was there", "")),
            str(one.directory),
        )
        for one in built
    ]
    note = "the engine that was built last is used; `--precision` of run, bench and validate asks for another"
    print_table(f"engines of {bundle}", ["target", "part", "", "seconds>", "engine"], rows, note)
    where = f"on a machine with such a GPU ({crossed}): " if crossed else ""
    if crossed and not all(one.directory.is_relative_to(bundle) for one in built):
        warning = "the bundle cannot be written, so the engine is not in it: build a copy of it, and take that along"
        typer.echo(typer.style("warning:", fg="yellow", bold=True) + f" {warning}")
    typer.echo(f"next: {where}perceiver-export bench {shlex.quote(bundle)} --device {built[-1].target}")


def _lower(bundle: str, target: str, precision: Precision) -> tuple[Lowered, ...]:
    from perceiver_export.runtimes.engines.targets import find_target
    from perceiver_export.runtimes.errors import UsageError

    if find_target(target).module != "tensorrt":
        raise UsageError(
            f"build rewrites no graph for {target}: fp32 graphs need none, quantize writes those of int8 bundles",
            "leave --lower-only out",
        )
    from perceiver_export.calibration.lowering.tensorrt_bundle import lower_bundle

    return lower_bundle(bundle, target, precision)


def _show_lowered(lowered: list[Lowered]) -> None:
    for one in lowered:
        kept = sum(map(len, one.kept.values()))
        if one.name.startswith("tensorrt8-"):  # the graph is fp32 still, so there is nothing to measure
            result = "the builder sets the precision of the others"
        else:
            result = f"{min(one.sqnr.values()):.1f} dB SQNR on ONNX Runtime"
        stay = "1 node stays" if kept == 1 else f"{kept} nodes stay"
        typer.echo(f"{one.name}: {', '.join(one.files)}; {stay} fp32, {result}")


def _sizes(texts: list[str]) -> dict[str, tuple[int, int, int]]:
    from perceiver_export.runtimes.errors import UsageError

    sizes = {}
    for text in texts:
        name, value = _pair(text, "--shape")
        numbers = [int(number) if number.isdecimal() else 0 for number in value.split(":")]
        if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            raise UsageError(f"--shape {text} gives no sizes", "as in --shape batch=1:4:16: least, best, most")
        sizes[name] = (numbers[0], numbers[1], numbers[2])
    return sizes


def _pair(text: str, option: str) -> tuple[str, str]:
    from perceiver_export.runtimes.errors import UsageError

    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UsageError(f"{option} {text} is not NAME=VALUE", f"as in {option} NAME=VALUE")
    return name, value
