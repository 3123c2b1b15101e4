# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export validate`: one run, a shard of it, merged shards, or a plan."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from perceiver_export.calibration.options import option
from perceiver_export.calibration.validation.options import Gates, ValidateOptions, parse_shard
from perceiver_export.exporter.cli import output as ui
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.files import readable, write_bytes

if TYPE_CHECKING:
    from perceiver_export.calibration.report.tables import Report
    from perceiver_export.calibration.validation.results import Validation
    from perceiver_export.runtimes.certificates import Certificate

_SHOWN_WORST = 5
_OF_MERGE = ("against", "certify", "allow_overlap", "threads")  # options that --merge has; the gates are others


@dataclass(frozen=True)
class _Files:
    """Where the scores come from (DATA, a share of it, files of all shares; or a plan instead), and further outputs."""

    data: str | None = option(None, "Images with labels.csv or in class folders, .npz, .jsonl, module:function.")
    shard: str | None = option(None, "Judge only this share of the samples: 3/16 is the third of 16 shards.", "I/N")
    scores: str | None = option(None, "With --shard: write its scores here.", "FILE.json")
    merge: bool = option(False, "Judge the scores of all shards, the PART.json files, instead of DATA.")
    plan: bool = option(False, "Print how many samples the gates need; this needs no data.")
    flips: str = option("1%", "With --plan: expected share of answers that differ from the reference's.", "PERCENT")
    junit: Path | None = option(None, "Write the gates as JUnit XML.", "FILE")
    report: Path | None = option(None, "Write a report: self-contained .html, or .md.", "FILE")


@ui.options_of(ValidateOptions, _Files)
def validate(
    options: ValidateOptions,
    files: _Files,
    bundle: Annotated[
        str | None, typer.Argument(metavar="BUNDLE", help="The bundle to measure; --plan needs none.")
    ] = None,
    parts: Annotated[list[Path] | None, typer.Argument(metavar="PART.json", help="Scores for --merge.")] = None,
) -> None:
    """Measure a bundle against a reference on the same samples, with 95 % bounds; exit 1 if a gate does not hold.

    A gate that the samples cannot decide also fails, and reports how many samples would decide it.
    """
    if files.plan:
        _plan(options, files, bundle)
        return
    given = {"save_worst": options.save_worst, "junit": files.junit, "report": files.report}
    outputs = {name: Path(path) for name, path in given.items() if path is not None}
    if bundle is None or (files.merge and Path(bundle).is_file()):
        hint = "name it first: validate BUNDLE --data DATA, or validate BUNDLE --merge PART.json …"
        raise UsageError("no bundle is given", hint)
    _check_given(options, files, parts or ())
    _check_outputs(outputs, (bundle, files.data, cast("str | None", options.against), *(parts or ())))
    if files.shard is not None:
        _judge_shard(bundle, files, options)
        return
    if files.merge:
        from perceiver_export.calibration.validation.shards import merge

        results = merge(bundle, parts or (), options)
    else:
        results = _validated(bundle, files.data or "", options)
    _finish(bundle, _Outcome(results, files.data), options, outputs)


def _typed(given: ValidateOptions | Gates | _Files, *others: str) -> list[str]:
    """The options that differ from their defaults, except the ``others``."""
    found = [one for one in fields(given) if one.metadata and one.name not in others]
    return [f"--{one.name.replace('_', '-')}" for one in found if getattr(given, one.name) != one.default]


def _check_given(options: ValidateOptions, files: _Files, parts: Sequence[Path]) -> None:
    """Raise UsageError for options that are missing or have no effect together."""
    if files.merge and (typed := [*_typed(options, *_OF_MERGE), *_typed(files, "merge", "flips", "junit", "report")]):
        raise UsageError(f"{typed[0]} has no effect with --merge", "give it to the shards")
    if "--flips" in _typed(files):
        raise UsageError("--flips has no effect without --plan", "leave it out")
    if parts and not files.merge:
        hint = "give a reference with --against BUNDLE, and scores with --merge PART.json PART.json …"
        raise UsageError(f"{parts[0]} is given without --against or --merge", hint)
    if files.data is None and not files.merge:
        raise UsageError("no data is given", "give --data DATA, or --merge with the scores of shards")
    if (files.shard is None) != (files.scores is None):
        raise UsageError("a shard needs its number and a file", "give both: --shard 3/16 --scores part3.json")
    if options.seed and not options.sequential:
        raise UsageError(f"--seed {options.seed} has no effect without --sequential", "leave it out")
    if files.shard is not None and (later := _typed(files, "data", "shard", "scores")):
        raise UsageError(f"{later[0]} has no effect with --shard", "give it to --merge, with the gates")


def _plan(options: ValidateOptions, files: _Files, bundle: str | None) -> None:
    """Print the plan. Raises UsageError for options that have no effect with it, or a bundle."""
    from perceiver_export.calibration.validation.planning import POWERS, plan

    limits = [one.name for one in fields(Gates) if one.name != "metric"]
    typed = [*_typed(options), *_typed(files, "plan", "flips"), *_typed(options.gates, *limits)]
    typed += ["BUNDLE"] if bundle else []
    if typed:
        raise UsageError(f"{typed[0]} has no effect with --plan", "give gates, --flips and --json only")
    try:
        share = float(files.flips.strip().removesuffix("%"))
    except ValueError as error:
        raise UsageError(f"--flips is {files.flips!r}", "give a percentage, such as 1%") from error
    plans = plan(options.gates, share)
    ui.print_json({"powers": POWERS, "plans": plans})
    none = ("no number", "more than a million")
    rows = [
        (f"{one.option} {one.limit:g}", *(f"{n:,}" if n else none[one.possible] for n in one.samples)) for one in plans
    ]
    title = f"samples for a gate to hold if {share:g} % of answers differ from the reference's and the drop is 0"
    ui.print_table(title, ["gate", *(f"{power:.0%} of the time>" for power in POWERS)], rows)


def _judge_shard(bundle: str, files: _Files, options: ValidateOptions) -> None:
    from perceiver_export.calibration.validation.shards import encode_shard, validate_shard

    data, scores, shard = files.data or "", Path(files.scores or ""), parse_shard(files.shard or "")
    ui.check_output(scores, (bundle, data), ".json")
    options = _with_reference(bundle, options)
    with ui.progress_bar("validate") as progress:
        found = validate_shard(bundle, data, shard, options, progress=lambda *counts: progress("validate", *counts))
    write_bytes(scores, encode_shard(found))
    samples = {"samples": len(found.positions), "of": found.total}
    ui.print_json({"shard": files.shard, **samples, "scores": readable(scores)})
    ui.say(f"{len(found.positions):,} of {found.total:,} samples judged on {found.place}")
    ui.show_written(scores)
    ui.say(f"perceiver-export validate {shlex.quote(bundle)} --merge PART.json …", "next:")


def _finish(bundle: str, found: _Outcome, options: ValidateOptions, outputs: Mapping[str, Path]) -> None:
    """Print results, write outputs, and raise GateError unless all gates hold."""
    import msgspec

    if ui.shows_text():
        _show(found.results)
    try:
        _write(bundle, found, options, outputs)
    finally:  # even if the last output could not be written
        several = options.device == "all" or len(found.results) > 1
        shown = {"targets": found.results} if several else msgspec.structs.asdict(found.results[0])
        ui.print_json({**shown, "certificates": found.certificates, "written": found.written})
        for name, said in _summary(found) if found.certificates else ():
            ui.say(said, f"{name:<11}")
        ui.show_written(*found.written.values())
    for result in found.results:
        result.require()


@dataclass
class _Outcome:
    """The results and the data that was read, the report, certificates, and where outputs were written, by name."""

    results: tuple[Validation, ...]
    data: str | None = None
    report: Report | None = None
    certificates: tuple[Certificate, ...] = ()
    written: dict[str, str] = field(default_factory=dict)


def _check_outputs(outputs: Mapping[str, Path], read: Sequence[str | Path | None]) -> None:
    """Raise if one of the outputs cannot be written, before models run for minutes."""
    from perceiver_export.calibration.report.report import check_report_file

    if "report" in outputs:
        check_report_file(outputs["report"])
    places = [path.absolute() for path in outputs.values()]
    for name, path in outputs.items():
        if places.count(path.absolute()) > 1:
            raise UsageError(f"two outputs have the path {path}", "give two different paths")
        if name != "save_worst":
            ui.check_file(path.absolute())
        ui.check_output(path, read, ".xml" if name == "junit" else None)


def _with_reference(bundle: str, options: ValidateOptions) -> ValidateOptions:
    """The reference as a bundle, or as a function that runs a checkpoint in PyTorch."""
    against = cast("str | None", options.against)
    if against is None or (Path(against) / "manifest.json").is_file():
        return options
    from perceiver_export.exporter.sources import load_reference

    return replace(options, against=load_reference(bundle, against))


def _validated(bundle: str, data: str, options: ValidateOptions) -> tuple[Validation, ...]:
    from perceiver_export.calibration.validation.validation import validate_targets

    options = replace(_with_reference(bundle, options), keep_failures=True)
    with ui.progress_bar("validate") as progress:
        return validate_targets(bundle, data, options, progress=lambda *counts: progress("validate", *counts))


def _write(bundle: str, found: _Outcome, options: ValidateOptions, outputs: Mapping[str, Path]) -> None:
    """Write the outputs, and record their places in ``found``."""
    from perceiver_export.calibration.report.report import gather, junit, write_report
    from perceiver_export.calibration.validation.certify import certify
    from perceiver_export.runtimes.certificates import FILE

    if "save_worst" in outputs and outputs["save_worst"].is_dir():  # absent if outputs were NaN
        found.written["save_worst"] = readable(outputs["save_worst"])
    if "junit" in outputs:
        write_bytes(outputs["junit"], junit(found.results), hint="choose another file")
        found.written["junit"] = readable(outputs["junit"])
    try:
        if options.certify and all(result.held for result in found.results):
            found.certificates = certify(bundle, found.results)
            found.written["certificate"] = readable(Path(bundle) / FILE)
    finally:  # results that cannot be certified deserve a report too
        if "report" in outputs:
            command = shlex.join(["perceiver-export", *sys.argv[1:]])
            against = cast("str | None", options.against)
            with ui.progress_bar("report"), ui.new_file(outputs["report"]) as temporary:
                found.report = gather(bundle, found.results, against, command, options.threads, found.data)
                write_report(temporary, found.report)
            found.written["report"] = readable(outputs["report"])


def _summary(found: _Outcome) -> Iterator[tuple[str, str]]:
    """Size and speed (on the first of several targets), and the certificate."""
    from perceiver_export.calibration.report.tables import Report

    report = found.report or Report("", found.results)
    if any(one.ratio is not None for one in report.speeds):
        (target, _, p50, _, ratio, half, _, size), (*_, other) = report.latency.rows[:2]
        yield "size", f"{size}, reference {other}"
        yield "speed", f"{p50} a call on {target}, {ratio} the reference's time ({half} in half of the pairs)"
    claims = " and ".join(map(str, found.certificates[0].claims))
    yield "certificate", f"{claims} on {' and on '.join(one.target for one in found.certificates)}"


def _show(results: Sequence[Validation]) -> None:
    """Print the metrics of both sides as a table, then warnings, worst classes and samples, and the gates that held.

    A gate that does not hold becomes the error that follows.
    """
    from perceiver_export.calibration.report.tables import Report
    from perceiver_export.calibration.validation.gates import MARKS

    report, first = Report("", tuple(results)), results[0]
    places = [f"on {one.candidate.get('target')}" if len(results) > 1 else "" for one in results]
    each = [Report("", (result,)) for result in results]
    for own, where, result in zip(each, places, results, strict=True):
        colour = "green" if result.held else "red" if result.gates or result.failure else "yellow"
        ui.say(f"{where} {result.sentence}".strip(), f"{own.mark}:", colour)
    for own in each:
        ui.say("")
        ui.print_table(own.summary, own.accuracy.columns, own.accuracy.rows, own.accuracy.note)
    for warning in report.warnings:
        ui.say(warning, "warning:")
    flips = [row.flips for row in first.worst_classes]
    worst = [report.classes] * (any(count != 0 for count in flips)) + [report.samples] * (not flips or any(flips))
    for table in worst if first.reference is not None else ():
        ui.say("")
        ui.print_table(table.title, table.columns, table.rows[:_SHOWN_WORST])
    ui.say("")
    for where, result in zip(places, results, strict=True):
        for gate in filter(lambda gate: gate.held, result.gates):
            ui.say(f"{gate} {where}".removeprefix(MARKS["held"]).strip(), MARKS["held"], "green")
