# SPDX-License-Identifier: Apache-2.0
"""From validations and a bundle to a report: what the bundle knows of itself, and how fast it is here."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from perceiver_export.calibration.record import Calibration, read_calibration
from perceiver_export.calibration.report.commands import made_by
from perceiver_export.calibration.report.content import Report, Speed
from perceiver_export.calibration.report.tables import tables
from perceiver_export.calibration.validated import Validation
from perceiver_export.runtimes.benchmark import bench
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.certificates import engine_of, precision_of, valid_certificates
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.manifest import Manifest

_RUNS = 50
_MEASURED = "Each layer's product in this bundle against the reference's, on the first samples; worst run of each."
_RECORDED = "Each layer's own product against fp32's, at calibration; worst run of each."
_MOST_MOVED = 4 << 30  # bytes: all products of both graphs are held at once, and a report must not fill the memory

Layers = list[tuple[str, float]]


def gather(
    bundle: str | os.PathLike[str] | Bundle,
    validations: Sequence[Validation],
    reference: str | os.PathLike[str] | None = None,
    commands: Sequence[str] = (),
    threads: int | None = None,
) -> Report:
    """A report on a bundle that was validated. Each target is timed, in turn with ``reference`` if that is a bundle.

    The sensitivity of layers is then measured against the reference, on the data that was validated on; else it is what
    `quantize` wrote down at calibration.

    Raises what `bench` raises.
    """
    opened = open_bundle(bundle)
    manifest = opened.manifest
    record = read_calibration(opened)
    other = reference if reference is not None and (Path(reference) / "manifest.json").is_file() else None
    layers, how = _measured(opened, other, validations[0], threads) or (_recorded(record), _RECORDED)
    speeds = [speed for validation in validations for speed in _speeds(opened.path, other, validation, threads)]
    return Report(
        f"{manifest.name}: {manifest.task}, {manifest.precision}",
        tuple(validations),
        tuple(speeds),
        tuple(layers),
        tuple(table for table in tables(manifest, record) if table.rows),
        certificates=tuple(_certified(opened, validations)),
        sensitivity_note=how if layers else "",
        commands=(*made_by(manifest, record), *commands),
        versions={"perceiver-export": importlib.metadata.version("perceiver-export"), **_tools(manifest)},
    )


def _certified(bundle: Bundle, validations: Sequence[Validation]) -> Iterator[str]:
    """What is certified, for the targets that were validated."""
    for validation in validations:
        engine = engine_of(validation.candidate)
        for certificate in valid_certificates(bundle, str(validation.candidate.get("target")), engine):
            elsewhere = "" if certificate.data == validation.data.fingerprint else "; on other samples than this report"
            yield f"{certificate}{elsewhere}"


def _speeds(
    path: Path, other: str | os.PathLike[str] | None, validation: Validation, threads: int | None
) -> Iterator[Speed]:
    """Of the engine that was validated, in its precision."""
    target = str(validation.candidate.get("target", ""))
    precision = precision_of(engine_of(validation.candidate))
    measured = bench(path, against=other, device=target, runs=_RUNS, threads=threads, precision=precision)
    for side, folder in zip(measured.measurements, (path, other), strict=False):
        size = sum(entry.size for entry in open_bundle(folder or path, "never").manifest.files.values())
        yield Speed(target, side.name, side.p50, side.p95, side.peak_memory, size / 2**20)


def _measured(
    bundle: Bundle, reference: str | os.PathLike[str] | None, validation: Validation, threads: int | None
) -> tuple[Layers, str] | None:
    """Each layer's error as the bundle is, which shows one that was damaged too; None where it cannot be measured."""
    if reference is None or bundle.manifest.quantization is None:
        return None
    exact = open_bundle(reference, "never").manifest
    moved = sum(stage.activation_bytes for part in exact.parts.values() for stage in part.stages)
    if exact.quantization is not None or moved > _MOST_MOVED:
        return None
    try:
        from perceiver_export.calibration.layer_errors import measure_layer_errors

        found = measure_layer_errors(bundle, reference, validation.data.source, threads=threads)
    except (ImportError, UsageError, DataError):  # no onnx here, other linears, or targets among the data's arrays
        return None
    return [(error.group, error.sqnr) for error in found], _MEASURED


def _recorded(record: Calibration | None) -> Layers:
    """Each group's worst run at calibration, worst first."""
    worst: dict[str, float] = {}
    for part in record.parts.values() if record is not None else ():
        for linear in part.linears:
            if linear.sqnr is not None:
                worst[linear.group] = min(worst.get(linear.group, linear.sqnr), linear.sqnr)
    return sorted(worst.items(), key=lambda item: item[1])


def _tools(manifest: Manifest) -> dict[str, str]:
    return {f"{name} (at export)": version for name, version in manifest.tools.items()}
