# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from perceiver_export.exporter.cli.output import (
    DeviceOption,
    JsonFlag,
    ThreadsOption,
    print_json,
    print_table,
    progress_bar,
)

if TYPE_CHECKING:
    from perceiver_export.runtimes.benchmark import Bench


def bench(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle, or an ONNX file.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="BUNDLE0|MODEL.onnx", help="Measure this one too, in turn, and give the ratio."),
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="One part of a split bundle; without it all queries are decoded.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Counted calls.")] = 100,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Measure latency, throughput, load time and memory on this machine."""
    from perceiver_export.runtimes.benchmark import bench as bench_

    with progress_bar("bench", quiet=json) as progress:
        result = bench_(
            bundle,
            against=against,
            part=part,
            device=device,
            runs=runs,
            threads=threads,
            progress=lambda done, total: progress("bench", done, total),
        )
    if json:
        print_json(result)
    else:
        show_bench(result)


def show_bench(result: Bench) -> None:
    """The measurements as a table, the ratio below it."""
    columns = [
        "",
        "target",
        "engine",
        "threads",
        "batch>",
        "p50>",
        "p95>",
        "p99>",
        "samples/s>",
        "load>",
        "peak memory>",
    ]
    rows = [
        (
            side.name,
            side.target,
            side.engine,
            side.threads,
            str(side.batch),
            f"{side.p50:.2f} ms",
            f"{side.p95:.2f} ms",
            f"{side.p99:.2f} ms",
            f"{side.throughput:,.0f}",
            f"{side.load:.0f} ms",
            f"{side.peak_memory:.0f} MiB ({side.base_memory:.0f} before load)",
        )
        for side in result.measurements
    ]
    print_table(f"{result.runs} runs on {result.machine}", columns, rows)
    for side in result.measurements:
        for certificate in side.certificates:
            typer.echo(f"{side.name}: {certificate}")
    if result.ratio is not None and result.ratio_quartiles is not None:
        low, high = result.ratio_quartiles
        first, second = (side.name for side in result.measurements)
        typer.echo(
            f"{first} takes {result.ratio:.3f} × the time of {second} a sample "
            f"(paired; half of the pairs within {low:.3f} to {high:.3f})"
        )
