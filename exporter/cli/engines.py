# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export build`, `lint`, `bench`, `profile` and `doctor`."""

from __future__ import annotations

import csv
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from operator import not_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from perceiver_export.calibration.options import option
from perceiver_export.exporter.cli import output as ui
from perceiver_export.runtimes.certificates import flagged
from perceiver_export.runtimes.engines.backend import Hint, PrecisionChoice
from perceiver_export.runtimes.errors import GateError, UsageError

if TYPE_CHECKING:
    from perceiver_export.calibration.lowering.lint import Lint
    from perceiver_export.runtimes.benchmark import Bench, Measurement
    from perceiver_export.runtimes.building import BuiltEngine

_SHOWN = 8  # nodes per rule
_LAYERS = 15  # rows of a profile
# Columns of `--precision auto`.
_PRECISIONS = ("ms (spread)", "× first", "memory, MiB", "size, MiB", "from torch", "verdict")
_BENCH_NOTE = (
    "ms (spread): median and middle half of the blocks of calls. samples/s: with two requests in flight. Memory: peak "
    "of a fresh process. Size: the bundle's files. From torch: the largest difference on random inputs, relative to "
    "the outputs' scale (!: above tolerance); for int8, use `validate`. Certified: on this machine."
)


def _size(text: str) -> tuple[str, tuple[int, int, int]]:
    name, value = ui.pair(text, "--shape", "batch=1:4:16")
    least, best, most = ([int(number) if number.isdecimal() else 0 for number in value.split(":")] + [0, 0, 0])[:3]
    if value.count(":") != 2 or not 1 <= least <= best <= most:
        raise UsageError(f"--shape {text} is not NAME=LEAST:BEST:MOST", "give --shape batch=1:4:16, for example")
    return name, (least, best, most)


@dataclass(frozen=True)
class _Build:
    precision: PrecisionChoice = option(
        "fp32", "fp32, fp16, bf16 or auto: measure all, save, and build the fastest one certified here, else fp32."
    )
    hint: Hint = option("latency", "Optimize for latency (of one request) or throughput.")
    shape: Mapping[str, tuple[int, int, int]] = option(dict, "Sizes of a named dimension.", "NAME=LEAST:BEST:MOST")
    flag: Mapping[str, str] = option(dict, "An engine setting of the target.", "NAME=VALUE")
    lower_only: bool = option(False, "Rewrite the graph for the target, but do not compile it.")
    force: bool = option(False, "Compile again even if a valid engine exists.")


@ui.options_of(_Build, shape=_size, flag=partial(ui.pair, option="--flag", example="workspace=2GiB"))
def build(
    bundle: ui.BundleArgument,
    target: Annotated[list[str], typer.Option(help="Target to compile for. May be repeated.")],
    how: _Build,
) -> None:
    """Compile a bundle for one or more targets, on the device that will run it."""
    from perceiver_export.runtimes.building import build as build_
    from perceiver_export.runtimes.building import check_auto
    from perceiver_export.runtimes.bundle import open_bundle
    from perceiver_export.runtimes.presence import precision_advice

    if how.lower_only:
        _lower(bundle, target, how.precision)
        return
    measured: dict[str, Bench] = {}
    if how.precision == "auto":
        check_auto(how.hint, how.shape, how.flag)
        _check_measurable(bundle, target)
        measured = {name: _measure(bundle, device=name, precision="auto", save=True) for name in target}
    given: dict[str, Any] = {"precision": how.precision, "hint": how.hint, "force": how.force}
    given |= {"shapes": how.shape, "flags": how.flag}
    with ui.progress_bar("build") as progress:
        built = [one for name in target for one in build_(bundle, name, **given, progress=progress)]
    engines = [{**dataclasses.asdict(one), "directory": str(one.directory)} for one in built]
    ui.print_json({"engines": engines, "bench": measured} if measured else engines)
    _show(bundle, built, how.flag.get("compute_capability", ""))
    if ui.shows_text():
        decided = (name for name, found in measured.items() if not found.unsteady)  # the others must be measured again
        for advice in filter(None, (precision_advice(open_bundle(bundle, "never"), name) for name in decided)):
            ui.say(advice, "note:")


def _check_measurable(bundle: str, targets: list[str]) -> None:
    from perceiver_export.runtimes.engines.backend import find_target

    for name in targets:
        if find_target(name).needs_engine:
            build_each = f"perceiver-export build {shlex.quote(bundle)} --target {name} --precision fp16"
            hint = f"build each precision first: {build_each}; then measure them with `bench --precision auto --save`"
            said = f"{name} takes minutes to compile, and --precision auto measures only engines that exist"
            raise UsageError(said, hint)


def _show(bundle: str, built: list[BuiltEngine], crossed: str) -> None:
    """``crossed``: the compute capability of the GPU of another machine, if engines were built for one."""
    for one in built:
        done = f"compiled in {one.seconds:.1f} s" if one.new else "already built"
        ui.say(f"{one.target}, part {one.part}, {one.precision}: {done}")
    several = "a target with several engines uses the one built last"
    ui.say(f"{several}; run, bench and validate choose another with `--precision`", "note:")
    where = f"on a machine with such a GPU ({crossed}): " if crossed else ""
    if crossed and not all(one.directory.is_relative_to(bundle) for one in built):
        ui.say("the bundle is read-only, so the engine is not in it: build a writable copy and ship that", "warning:")
    if crossed:
        from perceiver_export.runtimes.engines.cache import ENVIRONMENT, key_file

        ui.say(f"the other machine needs the engine's key: copy {key_file()} and set {ENVIRONMENT} to the copy")
    ui.show_written(*(one.directory for one in built if one.new))
    ui.say(f"{where}perceiver-export bench {shlex.quote(bundle)} --device {built[-1].target}", "next:")


def _lower(bundle: str, targets: list[str], precision: PrecisionChoice) -> None:
    from perceiver_export.runtimes.engines.backend import find_target

    if precision == "auto":
        raise UsageError("--lower-only cannot measure precisions, and --precision is auto", "name the precision")
    for name in targets:
        if find_target(name).module != "tensorrt":
            raise UsageError(f"{name} needs no lowering: its engine takes the bundle's graph", "leave --lower-only out")
    from perceiver_export.calibration import lower_bundle

    lowered = [lower_bundle(bundle, precision) for _ in targets]
    ui.print_json(lowered)
    for one in lowered:
        kept = sum(map(len, one.kept.values()))
        stay = "1 node stays" if kept == 1 else f"{kept} nodes stay"
        result = f"{min(one.sqnr.values()):.1f} dB SQNR on ONNX Runtime"
        ui.say(f"{one.name}: {', '.join(one.files)}; {stay} fp32, {result}")
    ui.show_written(*(Path(bundle, file) for one in lowered for file in one.files))


def lint(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL.onnx", help="A bundle, or an ONNX file.")],
    target: Annotated[str, typer.Option(help="tensorrt or tensorrt-rtx.")] = "tensorrt",
    version: Annotated[str | None, typer.Option(help="TensorRT version, such as 10.3; by default the newest.")] = None,
    precision: Annotated[str | None, typer.Option(help="Check only the graph lowered to fp16, bf16 or fp32.")] = None,
) -> None:
    """List nodes that TensorRT would refuse, not fuse, or not run in int8; exit 1 if it would refuse any."""
    from perceiver_export.calibration import lint as lint_

    results = lint_(bundle, target, version, precision)
    ui.print_json(results)
    for result in results:
        show_lint(result)
    refused = [finding for result in results for finding in result.findings if finding.kind == "refused"]
    if refused:
        raise GateError(f"{results[0].version} would refuse it: {refused[0].message}", refused[0].fix)


def show_lint(result: Lint) -> None:
    """Print each problem with its first nodes, then the state of attention and weights."""
    nodes: dict[tuple[str, ...], list[str]] = {}
    for finding in result.findings:
        nodes.setdefault((finding.kind, finding.rule, finding.message, finding.fix), []).append(finding.node)
    ui.say(f"{result.graph} for {result.version}: {len(nodes) or 'no'} problem{'s' * (len(nodes) != 1)}")
    for (kind, rule, message, fix), names in nodes.items():
        more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
        ui.say(f"{message} ({rule})", f"{kind}:")
        for name in (*names[:_SHOWN], *more):
            ui.say(f"  {name}")
        ui.say(f"  fix: {fix}")
    ui.say(f"attention: {result.fusable} of {result.attentions} become one kernel each")
    reasons: dict[str, list[str]] = {}
    for node, reason in result.unfused.items():
        reasons.setdefault(reason, []).append(node)
    for reason, names in reasons.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        ui.say(f"  {len(names)} not fused: {names[0]}{others} ({reason})")
    once, each = ui.mebibytes(result.weight_bytes), ui.mebibytes(result.bytes_each_use)
    copied = "" if once == each else f"; {each} if an engine copies them for each use"
    ui.say(f"weights: {once} as the graph stores them{copied}")


@dataclass(frozen=True)
class _Bench:
    against: str | None = option(None, "Also measure this one, in turn, and give the ratio.", "BUNDLE|MODEL.onnx")
    part: str | None = option(None, "Measure one part of a split bundle; by default all queries are decoded.")
    runs: int = option(100, "Timed calls: 5 or more, rounded up to a multiple of 4.")
    device: str = option("auto", "Target to run on; `auto` prefers a certified target; `all` runs each in turn.")
    precision: PrecisionChoice | None = option(
        None,
        "Precision of the engine; `auto` measures all that the device supports; by default the engine built last.",
    )
    threads: int | None = option(None, "Threads of the engine; by default the engine chooses.")
    save: bool = option(False, "Save the figures in the bundle's report.json, for `auto` and `package`.")


@ui.options_of(_Bench)
def bench(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle, or an ONNX file.")],
    how: _Bench,
    csv_: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE.csv", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Measure latency, throughput, load time, memory and accuracy on this machine."""
    if csv_ is not None:
        ui.check_output(csv_, (bundle, how.against), ".csv")
    result = _measure(bundle, **vars(how))
    if csv_ is not None:
        _write_csv(csv_, result.measurements, machine=result.machine)
    ui.show_written(Path(bundle, "report.json") if how.save else None, csv_)
    ui.print_json(result)


def _measure(bundle: str, **options: Any) -> Bench:
    """Run `bench` and print its result."""
    from perceiver_export.runtimes.benchmark import bench as bench_

    with ui.progress_bar("bench") as progress:
        result = bench_(bundle, **options, progress=lambda done, total: progress("bench", done, total))
    _show_bench(result, options["precision"] == "auto")
    return result


def _show_bench(result: Bench, precisions: bool) -> None:
    """Print a table with a column for each side, or a row for each of many; below it, the conclusions."""
    sides = result.measurements
    figures = [_figures(side, "tie" if len(result.fastest) > 1 else "fastest") for side in sides]
    title = f"{result.runs} timed calls on {', '.join(result.machine.split(', ')[:2])}"  # without instructions
    if len(sides) > (1 if precisions else 2):
        shared, names = _names(
            [(one.name, f"in {own['precision']}", f"on {one.target}") for one, own in zip(sides, figures, strict=True)]
        )
        keys = [key for key in _PRECISIONS if any(one[key] for one in figures)]
        rows = [(name, *(one[key] for key in keys)) for name, one in zip(names, figures, strict=True)]
        ui.print_table(f"{title}{shared}", ["", *(f"{key}>" for key in keys)], rows, _BENCH_NOTE)
    else:
        rows = [(name, *(one[name] for one in figures)) for name in figures[0] if any(one[name] for one in figures)]
        ui.print_table(title, ["", *(f"{side.name}>" for side in sides)], rows, _BENCH_NOTE)
    if precisions and len(sides) == 1 and not result.skipped:
        ui.say(f"{sides[0].target} supports no lower precision here; another target may")
    if result.unsteady:
        ui.say(f"the times are too unsteady to compare: {result.unsteady}", "warning:")
    for reason in result.skipped:
        ui.say(f"not measured: {reason}")
    if result.ratio is not None and result.ratio_quartiles is not None and not result.unsteady:
        low, high = result.ratio_quartiles
        several = len({side.target for side in sides}) > 1
        first, second = (f"{side.name} on {side.target}" if several else side.name for side in sides)
        ui.say(
            f"{first} takes {result.ratio:.3f} × the time of {second} per sample "
            f"(paired; half of the pairs within {low:.3f} to {high:.3f})"
        )


def _names(sides: Sequence[Sequence[str]]) -> tuple[str, list[str]]:
    """The parts that the names of all sides share, for the title, and the rest of each name."""
    alike = [len(set(parts)) == 1 for parts in zip(*sides, strict=True)]
    shared = " ".join(compress(sides[0], alike))
    return f"; all {shared}" * bool(shared), [" ".join(compress(side, map(not_, alike))) for side in sides]


def _figures(side: Measurement, fastest: str) -> dict[str, str]:
    milliseconds = [f"{one:.{2 if side.median < 100 else 0}f}" for one in (side.median, *side.spread)]
    difference = "–" if side.difference is None else f"{side.difference:.1e}"
    wrong = "!" * (side.within_tolerance is False)  # for int8, `validate` decides how close is enough
    return {
        "target": side.target,
        "engine": side.engine,
        "precision": side.precision + flagged(side.flags),
        "threads": side.threads,
        "batch": str(side.batch),
        "p50 / p95 / p99": f"{side.p50:.2f} / {side.p95:.2f} / {side.p99:.2f} ms",
        "ms (spread)": "{} ({} to {})".format(*milliseconds),
        "× first": "" if side.ratio is None else f"{side.ratio:.3f}",
        "samples/s": f"{side.throughput:,.0f}",
        "load": f"{side.load:.0f} ms",
        "memory, MiB": f"{side.peak_memory:.0f}",
        "size, MiB": f"{side.size:,.1f}",
        "from torch": difference + wrong,
        "verdict": ("certified" if side.certificates else "uncertified") + f"\n{fastest}" * side.fastest,
    }


def _write_csv(path: Path, rows: Sequence[msgspec.Struct], **common: str) -> None:
    """Write a line for each row and a column for each field; spaces separate several numbers in one cell."""
    with ui.new_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*common, *rows[0].__struct_fields__])
        writer.writeheader()
        for row in map(msgspec.to_builtins, rows):
            row |= {name: [f"{key}={one[key]}" for key in one] for name, one in row.items() if isinstance(one, dict)}
            joined = {name: " ".join(map(str, one)) for name, one in row.items() if isinstance(one, (list, tuple))}
            writer.writerow({**common, **row, **joined})


@dataclass(frozen=True)
class _Profile:
    device: str = option("auto", "Target to run on; `auto` prefers a certified target.")
    precision: PrecisionChoice | None = option(None, "Use the engine of this precision; by default the one built last.")
    against: str | None = option(None, "Also profile this one, and give each layer's time relative to it.", "BUNDLE")
    data: str | None = option(None, "With --against FLOAT_BUNDLE: measure the layers' SQNR on this data.", "DATA")
    threads: int | None = option(None, "Threads of the engine; by default the engine chooses.")


@ui.options_of(_Profile)
def profile(
    bundle: ui.BundleArgument,
    how: _Profile,
    sort: Annotated[
        Literal["time", "loss"], typer.Option(metavar="time|loss", help="Slowest or least accurate layers first.")
    ] = "time",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write all layers to this .csv or .html file.")
    ] = None,
) -> None:
    """Show what the engine really runs, one row per layer: precisions, kernel, time, roofline, accuracy."""
    from perceiver_export.calibration import profile as profile_

    if output is not None:
        ui.check_output(output, (bundle, how.against, how.data), ".html" if output.suffix == ".html" else ".csv")
    with ui.progress_bar("profile"):
        found = profile_(bundle, **vars(how))
    if output is not None and output.suffix == ".csv":
        _write_csv(output, found.worst(sort), target=found.target, engine=found.engine, unsteady=found.unsteady)
    elif output is not None:
        from perceiver_export.calibration.report.report import page

        with ui.new_file(output) as temporary:
            temporary.write_text(page(found.table(sort)), encoding="utf-8")
    ui.print_json(found)
    table = found.table(sort, _LAYERS).without("MiB>", "GFLOP/s>", "GB/s>", "kernel")
    kernels = [one.kernel for one in found.worst(sort)[:_LAYERS]]
    rows = [(f"{layer}\n  {kernel}", *row) for (layer, *row), kernel in zip(table.rows, kernels, strict=True)]
    ui.print_table(table.title, ("layer, kernel", *table.columns[1:]), rows, table.note)
    more = max(len(found.layers) - _LAYERS, 0)
    said = f"for {more} more layers and all figures" if more else "for all figures"
    ui.say(f"{said}, use -o FILE.csv, -o FILE.html or --json", "note:")
    ui.show_written(output)


def doctor() -> None:
    """Show what this machine can run, and the commands that install the rest."""
    from perceiver_export.runtimes.diagnosis import doctor as doctor_

    findings = doctor_()
    targets = [finding.device for finding in findings if finding.device is not None]
    ui.print_json({"targets": targets, "findings": findings})
    ui.print_table("this machine", ["", "found", "needed for"], [(f.what, f.found, f.needed_for) for f in findings])
    if not targets:
        ui.say("no target can run here yet")
    missing = [(finding.what, finding.fix) for finding in findings if finding.fix]
    if missing:
        ui.print_table("to install the rest", ["", "command"], missing)
