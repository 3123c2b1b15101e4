# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export validate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perceiver_export.exporter.cli.files import check_file, check_output, new_file
from perceiver_export.exporter.cli.output import (
    BundleArgument,
    JsonFlag,
    PrecisionOption,
    ThreadsOption,
    print_json,
    print_table,
    progress_bar,
)
from perceiver_export.runtimes.errors import UsageError

if TYPE_CHECKING:
    from perceiver_export.calibration.scores import MetricResult
    from perceiver_export.calibration.sides import Reference
    from perceiver_export.calibration.statistics import Estimate
    from perceiver_export.calibration.validated import Validation

_SHOWN_WORST = 5


def validate(
    bundle: BundleArgument,
    data: Annotated[
        str, typer.Option(help="Pictures with labels.csv or in class folders, .npz, .jsonl, module:function.")
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="BUNDLE|SOURCE", help="Reference: another bundle, or the checkpoint in torch."),
    ] = None,
    against_device: Annotated[
        str | None,
        typer.Option(
            help="Target of the reference, by default BUNDLE's (of `all` the first). Without --against: BUNDLE on it."
        ),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Gate: most points that right answers may fall (95 % upper bound).")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Gate: least agreement with the reference, in percent (95 % lower bound).")
    ] = None,
    max_metric_change: Annotated[
        str | None, typer.Option(help="Gate: most that --metric may worsen, in its unit or as 2% (95 % upper bound).")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="One of the task's metrics, or module:function.")] = None,
    samples: Annotated[int | None, typer.Option(help="Stop after so many samples.")] = None,
    device: Annotated[str, typer.Option(help="Target; `auto` is the first present, `all` each of them.")] = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    junit: Annotated[str | None, typer.Option(metavar="FILE", help="Write the gates as JUnit XML.")] = None,
    certify: Annotated[
        bool,
        typer.Option("--certify", help="Write a certificate into BUNDLE if all gates hold; it shows where it holds."),
    ] = False,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Certify though samples were calibrated on, or are repeated.")
    ] = False,
    save_worst: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Save the worst samples here (pictures, inputs, worst.json) and classes."),
    ] = None,
    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a report: .html with everything in it, or .md.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Measure a bundle, paired with a reference, with 95 % bounds; exit 1 where a gate does not hold.

    A gate that the samples cannot decide is no pass either: it says how many would.
    """
    from perceiver_export.calibration.targets import validate_targets

    gates: dict[str, Any] = {"max_drop": max_drop, "min_agreement": min_agreement}
    gates["max_metric_change"] = max_metric_change
    _check_files(junit, report)
    for written, ending in ((junit, ".xml"), (report, None), (save_worst, None)):
        if written is not None:
            check_output(Path(written), (bundle, data, against), ending)
    if certify and all(gate is None for gate in gates.values()):
        raise UsageError("a certificate says that a gate held", "ask for one: --max-drop, --min-agreement")
    options: dict[str, Any] = {**gates, "metric": metric, "samples": samples, "threads": threads}
    options |= {"allow_overlap": allow_overlap or not certify, "certifying": certify, "save_worst": save_worst}
    options["precision"] = precision
    with progress_bar("validate", quiet=json) as progress:
        results = validate_targets(
            bundle,
            data,
            device,
            against=None if against is None else _reference(bundle, against),
            against_device=against_device,
            keep_failures=True,
            progress=lambda done, total: progress("validate", done, total),
            **options,
        )
    if junit is not None:
        _write_junit(Path(junit), results)
    if json:
        print_json(results[0] if device != "all" else {"targets": results})
    else:
        _show(bundle, results)
    try:
        if certify and all(result.held for result in results):
            _certify(bundle, results, json)
    finally:  # what could not be certified is worth a report too
        if report is not None:
            _write_report(Path(report), bundle, results, against, threads)
    for result in results:
        result.require()


def _check_files(junit: str | None, report: str | None) -> None:
    """Before models run for minutes: raise UsageError where a file could not be written."""
    if report is not None:
        from perceiver_export.calibration.report import check_report_file

        check_report_file(Path(report))
    files = [Path(file).absolute() for file in (junit, report) if file is not None]
    for file in files:
        check_file(file)
    if len(set(files)) < len(files):
        raise UsageError(f"{report} cannot be both the JUnit file and the report", "give each a file of its own")


def _reference(bundle: str, against: str) -> str | Reference:
    """``--against`` as `validate` takes it: a bundle by its path, a checkpoint as a function that runs it in torch."""
    if (Path(against) / "manifest.json").is_file():
        return against
    from perceiver_export.exporter.reference import load_reference

    return load_reference(bundle, against)


def _show(bundle: str, results: Sequence[Validation]) -> None:
    for result in results:
        show_validation(bundle, result)
    if len(results) > 1:
        show_targets(results)


def show_validation(name: str, result: Validation) -> None:
    """The metrics of both sides as a table; below it warnings, worst classes and samples, and gates."""
    title = f"{name} on {result.samples:,} sample{'s' if result.samples != 1 else ''}"
    title += f", {_where(result.candidate)}"
    if result.reference is not None:
        title += f", against {result.reference['name']} ({_where(result.reference)})"
    rows = [_row(metric) for metric in result.metrics]
    if result.failure is not None:
        rows.append(("outputs", "NaN or infinite", "", "", ""))
    elif not rows:
        rows.append(("outputs", "all finite; no labels and no reference to measure against", "", "", ""))
    columns = ["", "measured>", "95 % bounds>", "reference>", "worse by (bounds)>"]
    flips = next((metric for metric in result.metrics if metric.lost is not None), None)
    note = "" if flips is None else _flips(flips, result.mcnemar)
    print_table(title, columns, rows, f"each bound holds with 95 % by itself{note}")
    for warning in result.warnings:
        typer.echo(f"warning: {warning}")
    if result.reference is not None and any(row.flips != 0 for row in result.worst_classes):
        _show_classes(result)
    if result.reference is not None and (not result.worst_classes or any(row.flips for row in result.worst_classes)):
        _show_samples(result)
    for gate in result.gates:
        if gate.held:  # one that does not is the error that follows
            typer.echo(str(gate))


def _where(side: Mapping[str, Any]) -> str:
    """Target, and the precision of the engine that was taken there."""
    return ", ".join(str(side[key]) for key in ("target", "precision") if key in side)


def _certify(bundle: str, results: Sequence[Validation], json: bool) -> None:
    """Write the certificates and say them, where JSON is printed beside it."""
    from perceiver_export.calibration.certificate import certify

    for certificate in certify(bundle, results):
        typer.echo(f"certified: {certificate}", err=json)


def _write_junit(path: Path, results: Sequence[Validation]) -> None:
    from perceiver_export.calibration.junit import junit

    with new_file(path) as temporary:
        temporary.write_bytes(junit(results))


def _write_report(
    path: Path, bundle: str, results: Sequence[Validation], against: str | None, threads: int | None
) -> None:
    """The report on what was validated, with the command that was typed."""
    import shlex
    import sys

    from perceiver_export.calibration.report import write_report
    from perceiver_export.calibration.report.gather import gather

    command = shlex.join(["perceiver-export", *sys.argv[1:]])
    with new_file(path) as temporary:
        write_report(temporary, gather(bundle, results, against, [command], threads))


def show_targets(results: Sequence[Validation]) -> None:
    """All targets beside each other."""
    names = list(dict.fromkeys(metric.name for result in results for metric in result.metrics))
    rows = []
    for result in results:
        values = {metric.name: _value(metric.candidate.value, metric.unit) for metric in result.metrics}
        gates = ", ".join(f"{gate.wanted.option} {gate.outcome}" for gate in result.gates) or "none asked"
        gates = gates if result.failure is None else "failed: NaN or infinite outputs"
        rows.append((str(result.candidate.get("target", "")), *(values.get(name, "") for name in names), gates))
    print_table("all targets", ["target", *(f"{name}>" for name in names), "gates"], rows)


def _row(metric: MetricResult) -> tuple[str, str, str, str, str]:
    unit, change = metric.unit, metric.worsening
    worse = ""
    if change is not None:
        points = "points" if unit == "%" else unit
        worse = f"{change.value:+.4g} ({change.lower:+.4g} to {change.upper:+.4g}) {points}"
    other = "" if metric.reference is None else _value(metric.reference.value, unit)
    return metric.name, _value(metric.candidate.value, unit), _bounds(metric.candidate, unit), other, worse


def _value(value: float, unit: str) -> str:
    return f"{value:.2f} %" if unit == "%" else f"{value:.4g} {unit}".strip()


def _bounds(found: Estimate, unit: str) -> str:
    return f"{found.lower:.2f} to {found.upper:.2f}" if unit == "%" else f"{found.lower:.4g} to {found.upper:.4g}"


def _flips(metric: MetricResult, p_value: float | None) -> str:
    if p_value is None:
        return ""
    return (
        f"; {metric.lost:,} right with the reference only, {metric.gained:,} with the candidate only"
        f" (exact McNemar p = {p_value:.3g})"
    )


def _show_classes(result: Validation) -> None:
    rows = [
        (row.label, f"{row.samples:,}", *(_share(side) for side in (row.candidate, row.reference)), f"{row.flips:,}")
        for row in [row for row in result.worst_classes if row.changed][:_SHOWN_WORST]
    ]
    print_table("worst classes", ["label", "samples>", "right>", "reference right>", "answers that differ>"], rows)


def _show_samples(result: Validation) -> None:
    units = {metric.name: metric.unit for metric in result.metrics}
    rows = [
        (row.name, row.label, row.reference, row.candidate, _scores(row.scores, units))
        for row in result.worst_samples[:_SHOWN_WORST]
    ]
    columns = ["sample", "label", "reference", "candidate", "scores"]
    said = [index for index in range(len(columns)) if any(row[index] for row in rows)]  # only classifiers have labels
    print_table("worst samples", [columns[index] for index in said], [[row[index] for index in said] for row in rows])


def _scores(scores: Mapping[str, float], units: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value:.4g} {units[name]}".strip() for name, value in scores.items())


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"
