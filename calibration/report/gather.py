# SPDX-License-Identifier: Apache-2.0
"""From validations and a bundle to a report: what the bundle knows of itself, and how fast it is here."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.calibration.report.content import Report, Speed, Table, sides
from perceiver_export.calibration.validation import Validation
from perceiver_export.runtimes.benchmark import bench
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.manifest import Manifest

_RUNS = 50
_CALIBRATION = "calibration.json"


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
    record = _record(opened)
    other = reference if reference is not None and (Path(reference) / "manifest.json").is_file() else None
    speeds = [speed for target in sides(validations) for speed in _speeds(opened.path, other, target, threads)]
    return Report(
        f"{manifest.name}: {manifest.task}, {manifest.precision}",
        tuple(validations),
        tuple(speeds),
        tuple(_sensitivity(record)),
        tuple(table for table in _tables(manifest, record) if table.rows),
        commands=tuple(commands),
        versions={"perceiver-export": importlib.metadata.version("perceiver-export"), **_tools(manifest)},
    )


def _record(bundle: Bundle) -> dict[str, Any]:
    if _CALIBRATION not in bundle.manifest.files:
        return {}
    record: dict[str, Any] = msgspec.json.decode(bundle.file(_CALIBRATION).read_bytes())
    return record


def _speeds(path: Path, other: str | os.PathLike[str] | None, target: str, threads: int | None) -> Iterator[Speed]:
    measured = bench(path, against=other, device=target, runs=_RUNS, threads=threads)
    for side, folder in zip(measured.measurements, (path, other), strict=False):
        size = sum(entry.size for entry in open_bundle(folder or path, "never").manifest.files.values())
        yield Speed(target, side.name, side.p50, side.p95, side.peak_memory, size / 2**20)


def _sensitivity(record: dict[str, Any]) -> list[tuple[str, float]]:
    """Each group's worst run, worst first."""
    worst: dict[str, float] = {}
    for part in record.get("parts", {}).values():
        for linear in part["linears"]:
            if linear["sqnr"] is not None:
                worst[linear["group"]] = min(worst.get(linear["group"], 1e9), linear["sqnr"])
    return sorted(worst.items(), key=lambda item: item[1])


def _tables(manifest: Manifest, record: dict[str, Any]) -> Iterator[Table]:
    rows = [
        (
            part,
            coverage["target"],
            f"{100 * coverage['share']:.1f} %",
            f"{sum(layer['integer'] for layer in coverage['layers'])} of {len(coverage['layers'])}",
        )
        for part, held in record.get("parts", {}).items()
        for coverage in held.get("coverage", ())
    ]
    note = "Read from what each engine says that it runs."
    columns = ("part", "target", "multiply-adds in integer kernels>", "linears>")
    yield Table("Kernel coverage", columns, tuple(rows), note)
    excluded = [
        (row["name"], f"{100 * row['share']:.2f} %", row["reason"])
        for held in record.get("parts", {}).values()
        for row in held.get("excluded", ())
    ]
    yield Table("Left in float by policy", ("product", "share of multiply-adds>", "why"), tuple(excluded))
    if record:
        data = record["data"]
        said = (
            ("scheme, ranges", f"{record['scheme']}, {record['method']}"),
            ("calibrated on", f"{data['samples']:,} samples of {data['source']}"),
            ("fingerprint", data["fingerprint"]),
            ("warnings", "; ".join([*data["warnings"], *record["warnings"]]) or "none"),
        )
        yield Table("Quantization", ("", ""), said)
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
