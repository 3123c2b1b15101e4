# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from perceiver_export.exporter.cli.output import JsonFlag, count, mebibytes, print_json, print_table, shape
from perceiver_export.runtimes.manifest import Part, PlannedStage, Stage

if TYPE_CHECKING:
    from perceiver_export.calibration.record import Calibration
    from perceiver_export.exporter.inspection import Inspection


def inspect(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL.onnx", help="A bundle, or an ONNX file.")],
    json: JsonFlag = False,
) -> None:
    """Show parts, shapes, and FLOPs, weights and bytes of each stage."""
    from perceiver_export.exporter.inspection import inspect_bundle

    inspection = inspect_bundle(bundle)
    if json:
        print_json(
            {
                "path": str(inspection.path),
                "bytes": inspection.bytes_on_disk,
                "parts": inspection.parts,
                "manifest": inspection.manifest,
                "calibration": inspection.calibration,
                "certificates": inspection.certificates,
                "certified_elsewhere": inspection.certified_elsewhere,
            }
        )
    else:
        show_inspection(inspection)


def show_inspection(inspection: Inspection) -> None:
    """What it is, then a table of stages for each part."""
    manifest = inspection.manifest
    if manifest is not None:
        kind = f"{manifest.task}, {manifest.precision}, {manifest.parity} numerics"
        typer.echo(f"{manifest.name}: {kind}, from {manifest.source}")
        if manifest.labels:
            more = ", …" if len(manifest.labels) > 5 else ""
            typer.echo(f"labels: {len(manifest.labels)} ({', '.join(manifest.labels[:5])}{more})")
    typer.echo(f"on disk: {mebibytes(inspection.bytes_on_disk)}")
    for certificate in inspection.certificates:
        typer.echo(f"certified, and valid here: {certificate}")
    if inspection.certified_elsewhere:
        typer.echo(f"certified elsewhere, not valid here: {', '.join(inspection.certified_elsewhere)}")
    for name, part in inspection.parts.items():
        for kind, specs in (("input", part.inputs), ("output", part.outputs)):
            for spec in specs:
                meaning = f", {spec.meaning}" if spec.meaning else ""
                typer.echo(f"{kind} {spec.name}: {spec.dtype} {shape(spec.shape)}{meaning}")
        whole = _sum(part.stages)
        rows = [_row(stage, whole) for stage in (*part.stages, whole) if _costs(stage, whole)]
        print_table(
            f"part {name} ({part.file}), for a batch of one",
            ["stage", "work>", "share>", "weights>", "weight bytes>", "bytes read and written>"],
            rows,
            "weights: numbers stored in the file, constants such as position tables included; shared ones count once",
        )
        _show_folds(part)
    if inspection.calibration is not None:
        show_precision(inspection.calibration)


def _show_folds(part: Part) -> None:
    """What was folded and why, and how much of each stage is computed at a time."""
    if part.folds:
        rows = [
            (
                one.site,
                *(f"{count(cost.flops)}FLOP, {mebibytes(cost.bytes)}" for cost in (one.plain, one.folded)),
                one.chosen,
                one.why,
            )
            for one in part.folds
        ]
        print_table("folds", ["site", "plain>", "folded>", "chosen", "why"], rows)
    if part.plan is not None:
        rows = [(one.stage, _at_a_time(one), mebibytes(one.bytes)) for one in part.plan.stages]
        title = f"memory plan, for {mebibytes(part.plan.budget)} of activations"
        print_table(title, ["stage", "at a time", "needs>"], rows)


def _at_a_time(stage: PlannedStage) -> str:
    return "all at once" if stage.at_a_time == stage.count else f"{stage.at_a_time} of {stage.count} {stage.unit}"


def show_precision(calibration: Calibration) -> None:
    """Each run of a linear: its precision, its SQNR, and the kernel that runs it on each engine."""
    data = calibration.data
    typer.echo(
        f"{calibration.how}, calibrated on {data.samples:,} samples of {data.source} "
        f"(fingerprint {data.fingerprint[:16]})"
    )
    typer.echo(f"quantized by policy: {calibration.policy}")
    for gate in calibration.gates:
        typer.echo(f"on the calibration data, {gate}")
    for name, part in calibration.parts.items():
        kernels = [{layer.name: layer.kernel for layer in one.layers} for one in part.coverage]
        macs = sum(one.macs for one in part.linears) + 1e-9
        rows = [
            (
                one.name,
                one.scheme,
                f"{one.macs / macs:.1%}",
                "" if one.sqnr is None else f"{one.sqnr:.1f}",
                *(engine.get(one.name, "float") for engine in kernels),
            )
            for one in part.linears
        ]
        engines = [f"{one.engine}: {one.share:.2%} of int8 in integer kernels" for one in part.coverage]
        print_table(f"linears of {name}", ["linear", "precision", "work>", "SQNR, dB>", *engines], rows)
        for excluded in part.excluded:
            typer.echo(f"float: {excluded.name} ({excluded.share:.1%} of the work): {excluded.reason}")
        for hazard in part.hazards:
            typer.echo(f"too large for fp16: {hazard.name}, up to {hazard.largest:.3g}, sums of {hazard.depth:,}")


def _sum(stages: tuple[Stage, ...]) -> Stage:
    return Stage(
        "all",
        sum(stage.flops for stage in stages),
        sum(stage.parameters for stage in stages),
        sum(stage.weight_bytes for stage in stages),
        sum(stage.activation_bytes for stage in stages),
    )


def _costs(stage: Stage, whole: Stage) -> bool:
    """Whether a stage is worth a row: it computes, holds weights, or moves a hundredth of all bytes."""
    return bool(stage.flops or stage.parameters) or stage.activation_bytes >= 0.01 * whole.activation_bytes > 0


def _row(stage: Stage, whole: Stage) -> tuple[str, ...]:
    return (
        stage.name,
        f"{count(stage.flops)}FLOP",
        f"{stage.flops / (whole.flops or 1):.1%}",
        count(stage.parameters).rstrip(),
        mebibytes(stage.weight_bytes),
        mebibytes(stage.activation_bytes),
    )
