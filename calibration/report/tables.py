# SPDX-License-Identifier: Apache-2.0
"""What a bundle says of itself, as tables of a report: kernels, precision, folds, memory plan, stages, verification."""

from __future__ import annotations

from collections.abc import Iterator

from perceiver_export.calibration.record import Calibration
from perceiver_export.calibration.report.content import Table
from perceiver_export.runtimes.manifest import Cost, Manifest

_MIB = 1 << 20


def tables(manifest: Manifest, record: Calibration | None) -> Iterator[Table]:
    """In the order of the report; some are empty."""
    if record is not None:
        yield from _quantization(record)
    yield _folds(manifest)
    yield _plan(manifest)
    yield _stages(manifest)
    yield _verified(manifest)


def _quantization(record: Calibration) -> Iterator[Table]:
    rows = [
        (
            part,
            one.target,
            f"{100 * one.share:.1f} %",
            f"{sum(layer.integer for layer in one.layers)} of {len(one.layers)}",
        )
        for part, held in record.parts.items()
        for one in held.coverage
    ]
    columns = ("part", "target", "int8 multiply-adds in integer kernels>", "linears>")
    yield Table("Kernel coverage", columns, tuple(rows), "Read from what each engine says that it runs.")
    excluded = [
        (one.name, f"{100 * one.share:.2f} %", one.reason) for held in record.parts.values() for one in held.excluded
    ]
    yield Table("Left in float by policy", ("product", "share of multiply-adds>", "why"), tuple(excluded))
    times = [
        (one.target, f"{one.fp32:.2f} ms", f"{one.quantized:.2f} ms", f"{one.ratio:.2f} ×") for one in record.speeds
    ]
    note = f"Median of a call, in turn, when it was quantized, on {record.machine}."
    yield Table("Speed against fp32", ("target", "fp32>", f"{record.scheme}>", "as fast>"), tuple(times), note)
    others = ", ".join(f"{name}: {one}" for name, one in record.precision.items())
    said = (
        ("scheme", record.how),
        ("other precisions", others or "none"),
        ("calibrated on", f"{record.data.samples:,} samples of {record.data.source}"),
        ("fingerprint", record.data.fingerprint),
        ("warnings", "; ".join(record.warnings) or "none"),
    )
    yield Table("Quantization", ("", ""), said)


def _folds(manifest: Manifest) -> Table:
    """Both forms of each site. Bytes are of each time that a large array is read or written, hence more than memory."""
    folds = [one for part in manifest.parts.values() for one in part.folds]
    scale, unit = _flops([cost for one in folds for cost in (one.plain, one.folded)])
    rows = tuple(
        (
            one.site,
            one.chosen,
            f"{one.plain.flops / scale:,.2f}",
            f"{one.folded.flops / scale:,.2f}",
            f"{one.plain.bytes / _MIB:,.1f}",
            f"{one.folded.bytes / _MIB:,.1f}",
            one.why,
        )
        for one in folds
    )
    columns = ("site", "chosen", f"plain {unit}>", f"folded {unit}>", "plain MiB moved>", "folded MiB moved>", "why")
    note = "Both forms compute the same; the graph has the one that was chosen. For one sample."
    return Table("Folds", columns, rows, note)


def _plan(manifest: Manifest) -> Table:
    plans = [(name, part.plan) for name, part in manifest.parts.items() if part.plan is not None]
    rows = tuple(
        (
            name,
            stage.stage,
            f"{stage.at_a_time:,} of {stage.count:,} {stage.unit}",
            f"{stage.bytes / _MIB:,.2f}",
        )
        for name, plan in plans
        for stage in plan.stages
    )
    note = " ".join(
        f"{name}: activations peak at {plan.peak / _MIB:,.2f} MiB, of a budget of {plan.budget / _MIB:,g} MiB."
        for name, plan in plans
    )
    return Table("Memory plan", ("part", "stage", "at a time", "MiB>"), rows, note)


def _stages(manifest: Manifest) -> Table:
    stages = [(name, stage) for name, part in manifest.parts.items() for stage in part.stages]
    scale, unit = _flops([Cost(stage.flops, 0) for _, stage in stages])
    rows = tuple(
        (
            name,
            stage.name,
            f"{stage.flops / scale:,.2f}",
            f"{stage.parameters:,}",
            f"{stage.activation_bytes / _MIB:.1f}",
        )
        for name, stage in stages
    )
    return Table("Stages, for one sample", ("part", "stage", f"{unit}>", "weights>", "MiB read and written>"), rows)


def _verified(manifest: Manifest) -> Table:
    checks = tuple(
        (check.output, check.inputs, f"{check.difference:.1e}", f"{check.tolerance:.0e}")
        for check in manifest.verification
    )
    note = "Differences from torch at export, as a share of the output's scale."
    return Table("Verified at export", ("output", "inputs", "largest difference>", "allowed>"), checks, note)


def _flops(costs: list[Cost]) -> tuple[float, str]:
    """The unit of a column: GFLOP where any number of it reaches one."""
    return (1e9, "GFLOP") if any(cost.flops >= 1e9 for cost in costs) else (1e6, "MFLOP")
