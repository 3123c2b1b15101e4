# SPDX-License-Identifier: Apache-2.0
"""What a quantized bundle was measured to be, before it is published."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perceiver_export.calibration.coverage import measure_coverage
from perceiver_export.calibration.effects import RUNNERS, measure_speed, output_effects
from perceiver_export.calibration.observe import Observation
from perceiver_export.calibration.quantize_part import QuantizedPart
from perceiver_export.calibration.record import Coverage, OutputEffect, Speed, share
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import GateError
from perceiver_export.runtimes.manifest import Manifest

_NEEDS = {"ort-cpu": "onnxruntime", "openvino-cpu": "openvino"}


@dataclass(frozen=True)
class Result:
    """Coverage by part, shares by target, outputs against fp32, speed against fp32, and what to be warned of."""

    coverage: dict[str, tuple[Coverage, ...]]
    shares: dict[str, float]
    effects: tuple[OutputEffect, ...]
    speeds: tuple[Speed, ...]
    warnings: tuple[str, ...]


def measure(
    source: Bundle,
    parts: Mapping[str, QuantizedPart],
    observation: Observation,
    directory: Path,
    threads: int | None,
) -> Result:
    """Run the quantized graphs of ``directory`` on every engine that is here."""
    call = observation.calls[0]
    targets = [target for target, module in _NEEDS.items() if importlib.util.find_spec(module) is not None]
    has_integers = any(part.integer_linears for part in parts.values())
    graphs = {target: graphs_for(target, source.manifest, parts, directory) for target in targets}
    coverage = {
        name: tuple(
            measure_coverage(target, graphs[target][name], part.integer_linears, call.feeds[name]) for target in targets
        )
        for name, part in parts.items()
        if part.integer_linears
    }
    shares = {
        target: share([layer for part in coverage.values() for layer in part[index].layers])
        for index, target in enumerate(targets)
        if has_integers
    }
    runners = {name: RUNNERS["ort-cpu"](path, threads) for name, path in graphs["ort-cpu"].items()}
    effects = output_effects(source.manifest, runners, observation.calls)
    fp32 = {name: source.file(part.file) for name, part in source.manifest.parts.items()}
    speeds = tuple(measure_speed(target, fp32, graphs[target], call, threads) for target in targets)
    return Result({name: coverage.get(name, ()) for name in parts}, shares, effects, speeds, tuple(_slow(speeds)))


def graphs_for(target: str, manifest: Manifest, parts: Mapping[str, QuantizedPart], directory: Path) -> dict[str, Path]:
    """The graph of each part that this machine runs for a target."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    key = f"{target}-arm64" if arm else target
    return {
        name: directory / parts[name].lowered.get(key, parts[name].lowered.get(target, part.file))
        for name, part in manifest.parts.items()
    }


def require_coverage(result: Result, least: float) -> None:
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
