# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export validate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from perceiver_export.calibration.validation.options import ValidateOptions
from perceiver_export.exporter.cli.output import (
    BundleArgument,
    JsonFlag,
    check_file,
    check_output,
    new_file,
    options_of,
    print_json,
    print_table,
    progress_bar,
    say,
)
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.files import readable

if TYPE_CHECKING:
    from perceiver_export.calibration.report.tables import Report
    from perceiver_export.calibration.validation.results import Validation
    from perceiver_export.runtimes.certificates import Certificate

_SHOWN_WORST = 5
_OUTPUTS = {"save_worst": "worst samples", "junit": "JUnit", "report": "report"}  # in words


@options_of(ValidateOptions)
def validate(
    bundle: BundleArgument,
    data: Annotated[
        str, typer.Option(help="Images with labels.csv or in class folders, .npz, .jsonl, module:function.")
    ],
    options: ValidateOptions,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the gates as JUnit XML.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report: .html with everything in it, or .md.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Measure a bundle, paired with a reference, with 95 % bounds; exit 1 if a gate does not hold.

    A gate that the samples cannot decide is not a pass either: it says how many would.
    """
    import msgspec

    against = cast("str | None", options.against)
    worst = None if options.save_worst is None else Path(options.save_worst)
    outputs = {name: path for name, path in zip(_OUTPUTS, (worst, junit, report), strict=False) if path is not None}
    _check_outputs(outputs, (bundle, data, against))
    found = _Outcome(_validated(bundle, data, against, options, json))
    if not json:
        _show(found.results)
    try:
        _write(bundle, found, options, outputs, json)
    finally:  # even if the last output could not be written
        if json:
            several = options.device == "all"
            shown = {"targets": found.results} if several else msgspec.structs.asdict(found.results[0])
            print_json({**shown, "certificates": found.certificates, "written": found.written})
        else:
            _show_written(found)
    for result in found.results:
        result.require()


@dataclass
class _Outcome:
    """The results, the report, certificates, and where outputs were written, by name."""

    results: tuple[Validation, ...]
    report: Report | None = None
    certificates: tuple[Certificate, ...] = ()
    written: dict[str, str] = field(default_factory=dict)


def _check_outputs(outputs: Mapping[str, Path], read: Sequence[str | None]) -> None:
    """Raise, before models run for minutes, if one of the outputs cannot be written."""
    from perceiver_export.calibration.report.report import check_report_file

    if "report" in outputs:
        check_report_file(outputs["report"])
    places = [path.absolute() for path in outputs.values()]
    for name, path in outputs.items():
        if places.count(path.absolute()) > 1:
            raise UsageError(f"two outputs would be {path}", "name two files")
        if name != "save_worst":
            check_file(path.absolute())
        check_output(path, read, ".xml" if name == "junit" else None)


def _validated(
    bundle: str, data: str, against: str | None, options: ValidateOptions, quiet: bool
) -> tuple[Validation, ...]:
    """`calibration.validate_targets`, against a bundle or a function that runs a checkpoint in PyTorch."""
    from perceiver_export.calibration.validation.validation import validate_targets

    if against is not None and not (Path(against) / "manifest.json").is_file():
        from perceiver_export.exporter.sources import load_reference

        options = replace(options, against=load_reference(bundle, against))
    options = replace(options, keep_failures=True)
    with progress_bar("validate", quiet=quiet) as progress:
        return validate_targets(bundle, data, options, progress=lambda *counts: progress("validate", *counts))


def _write(bundle: str, found: _Outcome, options: ValidateOptions, outputs: Mapping[str, Path], quiet: bool) -> None:
    """Write the outputs, and record their places in ``found``."""
    from perceiver_export.calibration.report.report import gather, junit, write_report
    from perceiver_export.calibration.validation.certify import certify
    from perceiver_export.runtimes.certificates import FILE

    if "save_worst" in outputs and outputs["save_worst"].is_dir():  # not if outputs were NaN
        found.written["save_worst"] = readable(outputs["save_worst"])
    if "junit" in outputs:
        with new_file(outputs["junit"]) as temporary:
            temporary.write_bytes(junit(found.results))
        found.written["junit"] = readable(outputs["junit"])
    try:
        if options.certify and all(result.held for result in found.results):
            found.certificates = certify(bundle, found.results)
            found.written["certificate"] = readable(Path(bundle) / FILE)
    finally:  # results that cannot be certified deserve a report too
        if "report" in outputs:
            command = shlex.join(["perceiver-export", *sys.argv[1:]])
            against = cast("str | None", options.against)
            with progress_bar("report", quiet=quiet), new_file(outputs["report"]) as temporary:
                found.report = gather(bundle, found.results, against, command, options.threads)
                write_report(temporary, found.report)
            found.written["report"] = readable(outputs["report"])


def _show_written(found: _Outcome) -> None:
    for certificate in found.certificates:
        say(f"certified: {certificate}")
    for name, said in {"certificate": "certificate", **_OUTPUTS}.items():
        if name in found.written:
            say(f"{said} written to {found.written[name]}")
    if found.certificates:
        say("")
        for name, said in _summary(found):
            say(said, f"{name:<11}")


def _summary(found: _Outcome) -> Iterator[tuple[str, str]]:
    """A certified bundle in a few lines: on the first target where there are several."""
    from perceiver_export.calibration.report.tables import Report

    report, quality = found.report or Report("", found.results), found.results[0].metrics[0]
    accuracy = {row[1]: row[2:] for row in reversed(report.accuracy.rows)}
    if quality.worsening is not None:
        yield "accuracy", "{} {}, reference {}, worse by {}".format(quality.name, *accuracy[quality.name])
    if "agreement" in accuracy:
        yield "agreement", f"{accuracy['agreement'][0]} of answers are the reference's"
    if any(one.ratio is not None for one, _ in report.speeds):
        (target, _, p50, _, ratio, half, _, size), (*_, other) = report.latency.rows[:2]
        yield "size", f"{size}, reference {other}"
        yield "speed", f"{p50} a call on {target}, {ratio} the reference's time ({half} in half of the pairs)"
    claims = " and ".join(map(str, found.certificates[0].claims))
    yield "certificate", f"{claims} on {' and on '.join(one.target for one in found.certificates)}"
    if "report" in found.written:
        yield "report", found.written["report"]


def _show(results: Sequence[Validation]) -> None:
    """The metrics of both sides as a table, then warnings, worst classes and samples, and the gates that held.

    A gate that does not hold is the error that follows.
    """
    from perceiver_export.calibration.report.tables import Report

    report = Report("", tuple(results))
    first, accuracy = report.validations[0], report.accuracy
    print_table(report.summary, accuracy.columns, accuracy.rows, accuracy.note)
    for warning in report.warnings:
        say(f"warning: {warning}")
    flips = [row.flips for row in first.worst_classes]
    worst = [report.classes] * (any(count != 0 for count in flips)) + [report.samples] * (not flips or any(flips))
    for table in worst if first.reference is not None else ():
        print_table(table.title, table.columns, table.rows[:_SHOWN_WORST])
    for result in report.validations:
        where = f" on {result.candidate.get('target')}" if len(report.validations) > 1 else ""
        for gate in result.gates:
            if gate.held:
                say(f"{gate}{where}")
