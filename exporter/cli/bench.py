# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from perceiver_export.exporter.cli.output import (
    JsonFlag,
    PrecisionOption,
    ThreadsOption,
    print_json,
    print_table,
    progress_bar,
)

if TYPE_CHECKING:
    from perceiver_export.runtimes.benchmark import Bench, Measurement
    from perceiver_export.runtimes.engines.backend import Precision


def bench(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle, or an ONNX file.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="BUNDLE|MODEL.onnx", help="Measure this one too, in turn, and give the ratio."),
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="One part of a split bundle; without it all queries are decoded.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Counted calls, 5 or more, rounded up to a multiple of 4.")] = 100,
    device: Annotated[
        str, typer.Option(help="Target to run on; `auto` takes the first that is present, `all` each in turn.")
    ] = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    energy: Annotated[
        bool, typer.Option("--energy", help="Joules a sample, where the board has power rails; 13 s more a target.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the figures in the bundle's report.json, for `auto` and `package`.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Write the figures here as well.")] = None,
    json: JsonFlag = False,
) -> None:
    """Measure latency, throughput, load time, memory and accuracy on this machine."""
    from perceiver_export.exporter.cli.files import check_file, check_output
    from perceiver_export.runtimes.benchmark import bench as bench_

    if csv is not None:
        check_output(csv, (bundle, against), ".csv")
        check_file(csv)
    with progress_bar("bench", quiet=json) as progress:
        result = bench_(
            bundle,
            against=against,
            part=part,
            device=device,
            runs=runs,
            threads=threads,
            precision=cast("Precision | None", precision),
            energy=energy,
            save=save,
            progress=lambda done, total: progress("bench", done, total),
        )
    if csv is not None:
        _write_csv(csv, result)
    if json:
        print_json(result)
    else:
        show_bench(result)


def show_bench(result: Bench) -> None:
    """The measurements as a table, ratios in it or below it."""
    several, energy = len(result.measurements) > 1, any(side.joules is not None for side in result.measurements)
    columns = ["", "target", "engine", "precision", "threads", "batch>", "p50 / p95 / p99>"]
    columns += ["× first>"] * several + ["samples/s>", "load>", "peak memory>", "from torch>"] + ["energy>"] * energy
    rows = [_row(side, several, energy) for side in result.measurements]
    note = (
        "samples/s: with two requests in flight; peak memory: of a fresh process, and in brackets before the load; "
        "from torch: largest difference of the outputs from torch's in fp32, as a share of their scale, on the random "
        "inputs of golden.npz (far from what int8 was calibrated for: `validate` tells its accuracy)"
    )
    print_table(f"{result.runs} counted calls on {result.machine}", columns, rows, note, turns=True)
    for reason in result.skipped:
        typer.echo(f"not measured: {reason}")
    for side in result.measurements:
        for certificate in side.certificates:
            typer.echo(f"{side.name}: {certificate}")
    if result.ratio is not None and result.ratio_quartiles is not None:
        low, high = result.ratio_quartiles
        several_targets = len({side.target for side in result.measurements}) > 1
        first, second = (
            f"{side.name} on {side.target}" if several_targets else side.name for side in result.measurements
        )
        typer.echo(
            f"{first} takes {result.ratio:.3f} × the time of {second} a sample "
            f"(paired; half of the pairs within {low:.3f} to {high:.3f})"
        )


def _row(side: Measurement, several: bool, energy: bool) -> list[str]:
    times = f"{side.p50:.2f} / {side.p95:.2f} / {side.p99:.2f} ms"
    ratio = ["1" if side.ratio is None else f"{side.ratio:.3f}"] * several
    joules = ["" if side.joules is None else f"{side.joules:.3g} J ({side.idle_watts:.1f} W idle)"] * energy
    memory = f"{side.peak_memory:.0f} MiB ({side.base_memory:.0f})"
    head = [side.name, side.target, side.engine, side.precision, side.threads, str(side.batch)]
    return [
        *head,
        times,
        *ratio,
        f"{side.throughput:,.0f}",
        f"{side.load:.0f} ms",
        memory,
        _difference(side),
        *joules,
    ]


def _difference(side: Measurement) -> str:
    if side.difference is None:
        return "–"
    found = f"{side.difference:.1e}"
    if side.tolerance is None:  # int8: how close it is enough, `validate` says
        return found
    return f"{found} ≤ {side.tolerance:.0e}" if side.within_tolerance else f"{found} > {side.tolerance:.0e}!"


def _write_csv(path: Path, result: Bench) -> None:
    import csv
    import io

    import msgspec

    from perceiver_export.exporter.cli.files import new_file

    rows = [msgspec.to_builtins(side) for side in result.measurements]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=["machine", *rows[0]])
    writer.writeheader()
    for row in rows:
        low_high = row.pop("ratio_quartiles") or ("", "")
        writer.writerow({"machine": result.machine, **row, "ratio_quartiles": " ".join(map(str, low_high)).strip()})
    with new_file(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
