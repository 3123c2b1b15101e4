# SPDX-License-Identifier: Apache-2.0
"""From validations and a bundle to a report: what the bundle knows of itself, and how fast it is here."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from perceiver_export.calibration.record import Calibration, read_calibration
from perceiver_export.calibration.report.content import Report, Speed, Table, sides
from perceiver_export.calibration.validation import Validation
from perceiver_export.runtimes.benchmark import bench
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.certificates import engine_of, valid_certificates
from perceiver_export.runtimes.manifest import Manifest

_RUNS = 50


def gather(
    bundle: str | os.PathLike[str] | Bundle,
    validations: Sequence[Validation],
    reference: str | os.PathLike[str] | None = None,
    commands: Sequence[str] = (),
    threads: int | None = None,
) -> Report:
    """A report on a bundle that was validated. Each target is timed, in turn with ``reference`` if that is a bundle.

    Raises what `bench` raises.
    """
    opened = open_bundle(bundle)
    manifest = opened.manifest
    record = read_calibration(opened)
    other = reference if reference is not None and (Path(reference) / "manifest.json").is_file() else None
    speeds = [speed for target in sides(validations) for speed in _speeds(opened.path, other, target, threads)]
    return Report(
        f"{manifest.name}: {manifest.task}, {manifest.precision}",
        tuple(validations),
        tuple(speeds),
        tuple(_sensitivity(record)),
        tuple(table for table in _tables(manifest, record) if table.rows),
        certificate=" ".join(_certified(opened, validations)),
        commands=tuple(commands),
        versions={"perceiver-export": importlib.metadata.version("perceiver-export"), **_tools(manifest)},
    )


def _certified(bundle: Bundle, validations: Sequence[Validation]) -> Iterator[str]:
    """What is certified, for the targets that were validated."""
    for validation in validations:
        engine = engine_of(validation.candidate)
        for certificate in valid_certificates(bundle, str(validation.candidate.get("target")), engine):
            yield f"Certified: {certificate}."


def _speeds(path: Path, other: str | os.PathLike[str] | None, target: str, threads: int | None) -> Iterator[Speed]:
    measured = bench(path, against=other, device=target, runs=_RUNS, threads=threads)
    for side, folder in zip(measured.measurements, (path, other), strict=False):
        size = sum(entry.size for entry in open_bundle(folder or path, "never").manifest.files.values())
        yield Speed(target, side.name, side.p50, side.p95, side.peak_memory, size / 2**20)


def _sensitivity(record: Calibration | None) -> list[tuple[str, float]]:
    """Each group's worst run, worst first."""
    worst: dict[str, float] = {}
    for part in record.parts.values() if record is not None else ():
        for linear in part.linears:
            if linear.sqnr is not None:
                worst[linear.group] = min(worst.get(linear.group, linear.sqnr), linear.sqnr)
    return sorted(worst.items(), key=lambda item: item[1])


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
    columns = ("part", "target", "multiply-adds in integer kernels>", "linears>")
    yield Table("Kernel coverage", columns, tuple(rows), "Read from what each engine says that it runs.")
    excluded = [
        (one.name, f"{100 * one.share:.2f} %", one.reason) for held in record.parts.values() for one in held.excluded
    ]
    yield Table("Left in float by policy", ("product", "share of multiply-adds>", "why"), tuple(excluded))
    others = ", ".join(f"{name}: {one}" for name, one in record.precision.items())
    said = (
        ("scheme, ranges", f"{record.scheme}, {record.method}"),
        ("other precisions", others or "none"),
        ("calibrated on", f"{record.data.samples:,} samples of {record.data.source}"),
        ("fingerprint", record.data.fingerprint),
        ("warnings", "; ".join(record.warnings) or "none"),
    )
    yield Table("Quantization", ("", ""), said)


def _tables(manifest: Manifest, record: Calibration | None) -> Iterator[Table]:
    if record is not None:
        yield from _quantization(record)
    yield _stages(manifest)
    checks = [
        (check.output, check.inputs, f"{check.difference:.1e}", f"{check.tolerance:.0e}")
        for check in manifest.verification
    ]
    note = "Differences from torch at export, as a share of the output's scale."
    names = ("output", "inputs", "largest difference>", "allowed>")
    yield Table("Verified at export", names, tuple(checks), note)


def _stages(manifest: Manifest) -> Table:
    rows = [
        (
            name,
            stage.name,
            f"{stage.flops / 1e6:,.2f}",
            f"{stage.parameters:,}",
            f"{stage.activation_bytes / 2**20:.1f}",
        )
        for name, part in manifest.parts.items()
        for stage in part.stages
    ]
    columns = ("part", "stage", "MFLOP>", "weights>", "MiB read and written>")
    return Table("Stages, for one sample", columns, tuple(rows))


def _tools(manifest: Manifest) -> dict[str, str]:
    return {f"{name} (at export)": version for name, version in manifest.tools.items()}
