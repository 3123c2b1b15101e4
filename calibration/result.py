# SPDX-License-Identifier: Apache-2.0
"""What a quantized bundle was measured to be, before it is published."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perceiver_export.calibration.coverage import measure_coverage
from perceiver_export.calibration.effects import measure_speed, ort_runner, output_effects
from perceiver_export.calibration.observe import Observation
from perceiver_export.calibration.quantize_part import QuantizedPart
from perceiver_export.calibration.record import Coverage, OutputEffect, Speed, share
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import GateError
from perceiver_export.runtimes.manifest import Part
from perceiver_export.runtimes.runtime import Feeds

_NEEDS = {"ort-cpu": "onnxruntime", "openvino-cpu": "openvino"}


@dataclass(frozen=True)
class Covered:
    """Coverage by part, and of all parts the share of multiply-adds in integer kernels by target."""

    coverage: dict[str, tuple[Coverage, ...]]
    shares: dict[str, float]


@dataclass(frozen=True)
class Compared:
    """Outputs and speed against fp32, and what to be warned of."""

    effects: tuple[OutputEffect, ...]
    speeds: tuple[Speed, ...]
    warnings: tuple[str, ...]


def measure_kernels(
    parts: Mapping[str, Part], quantized: Mapping[str, QuantizedPart], feeds: Mapping[str, Feeds], directory: Path
) -> Covered:
    """Ask every engine that is here what it runs of the quantized graphs in ``directory``, one after the other."""
    targets = _targets()
    graphs = {target: graphs_for(target, parts, directory) for target in targets}
    coverage = {
        name: tuple(
            measure_coverage(target, graphs[target][name], part.integer_linears, feeds[name]) for target in targets
        )
        for name, part in quantized.items()
        if part.integer_linears
    }
    shares = {
        target: share([layer for part in coverage.values() for layer in part[index].layers])
        for index, target in enumerate(targets)
        if coverage
    }
    return Covered({name: coverage.get(name, ()) for name in parts}, shares)


def compare(
    source: Bundle, parts: Mapping[str, Part], observation: Observation, directory: Path, threads: int | None
) -> Compared:
    """Run the quantized graphs of ``directory`` beside those of the fp32 ``source``, engine by engine."""
    effects = _effects(source, graphs_for("ort-cpu", parts, directory), observation, threads)
    fp32 = {name: source.file(part.file) for name, part in source.manifest.parts.items()}
    speeds = tuple(
        measure_speed(target, fp32, graphs_for(target, parts, directory), observation.calls[0], threads)
        for target in _targets()
    )
    return Compared(effects, speeds, tuple(_slow(speeds)))


def _effects(
    source: Bundle, graphs: Mapping[str, Path], observation: Observation, threads: int | None
) -> tuple[OutputEffect, ...]:
    """Its sessions are gone before those that are timed are opened."""
    runners = {name: ort_runner(path, threads, in_order=True) for name, path in graphs.items()}
    return output_effects(source.manifest, runners, observation.calls)


def _targets() -> list[str]:
    return [target for target, module in _NEEDS.items() if importlib.util.find_spec(module) is not None]


def graphs_for(target: str, parts: Mapping[str, Part], directory: Path) -> dict[str, Path]:
    """The graph of each part that this machine runs for a target."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    key = f"{target}-arm64" if arm else target
    return {
        name: directory / part.lowered.get(key, part.lowered.get(target, part.file)) for name, part in parts.items()
    }


def require_coverage(result: Covered, least: float) -> None:
    """Raise GateError where less than ``least`` percent of what was to be int8 runs in integer kernels."""
    for target, found in result.shares.items():
        if 100 * found < least - 1e-9:
            slow = [
                layer
                for part in result.coverage.values()
                for one in part
                if one.target == target
                for layer in one.in_float
            ]
            names = ", ".join(f"{layer.name} ({layer.kernel})" for layer in slow[:3])
            raise GateError(
                f"{100 * found:.2f} % of multiply-adds run in integer kernels on {target}, {least:g} % were asked for",
                f"in float: {names}; accept it with --min-coverage {int(100 * found)}, or name them in --keep-float",
            )


def _slow(speeds: tuple[Speed, ...]) -> list[str]:
    return [
        f"not faster than fp32 on this machine's {one.target}: {one.quantized:.1f} ms, fp32 {one.fp32:.1f} ms"
        for one in speeds
        if one.ratio <= 1.0
    ]
