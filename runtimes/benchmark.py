# SPDX-License-Identifier: Apache-2.0
"""Latency, throughput, load time, memory and distance from torch of one or several models, measured in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from perceiver_export.runtimes.bundle import Bundle, change_report, golden_arrays, open_bundle
from perceiver_export.runtimes.engines.backend import EngineOptions, Precision, find_target
from perceiver_export.runtimes.errors import BundleError, DeviceError, EngineError, UsageError, check_kind, check_whole
from perceiver_export.runtimes.loading import load, load_onnx
from perceiver_export.runtimes.machine import available_cores, cpu_features, cpu_name, peak_memory
from perceiver_export.runtimes.presence import choose_target, devices
from perceiver_export.runtimes.runtime import Array, Runtime, compare

# How far outputs may be from torch's in fp32, as a share of the output's scale: what export allows, and for fewer bits
# in proportion to what one rounding costs (2^-11 and 2^-8 against 2^-24, with room for the depth of a model).
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1}
_BLOCK = 5  # consecutive runs of one side; the first of a block finds cold caches and is not counted
_COUNTED = _BLOCK - 1
_WARMUP = 3


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One side. Times are milliseconds per call of ``batch`` samples; memory is MiB, of a fresh process.

    ``throughput`` is samples per second with two requests in flight. ``peak_memory`` is the process's largest resident
    size after load and runs; ``base_memory`` is what Python, numpy and the engine's library took before the load.
    ``ratio`` is the time of a sample relative to the first side's: the median over pairs of blocks, with quartiles.
    ``difference`` is the largest from torch's golden outputs, as a share of their scale; ``tolerance`` is the
    limit for the precision.
    """

    name: str
    target: str
    engine: str
    precision: str
    compiled: str
    threads: str
    batch: int
    p50: float
    p95: float
    p99: float
    throughput: float
    load: float
    peak_memory: float
    base_memory: float
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    difference: float | None = None
    tolerance: float | None = None
    certificates: tuple[str, ...] = ()  # that hold on this engine and machine

    @property
    def within_tolerance(self) -> bool | None:
        """Whether outputs are as near to PyTorch's as the precision allows; None if there is nothing to compare."""
        if self.difference is None or self.tolerance is None:
            return None
        return self.difference <= self.tolerance


class Bench(msgspec.Struct, frozen=True):
    """``ratio``: with ``against``, the median of the first side's time per sample by the second's, with its quartiles.

    ``skipped``: for ``device="all"``, the targets that refused the bundle, and why.
    """

    machine: str
    runs: int
    measurements: tuple[Measurement, ...]
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    skipped: tuple[str, ...] = ()


def bench(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    against: str | os.PathLike[str] | None = None,
    part: str | None = None,
    device: str = "auto",
    runs: int = 100,
    threads: int | None = None,
    precision: Precision | None = None,
    save: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Measure a bundle (or an ONNX file), alone or in turn with others, on the same machine in the same minutes.

    ``device`` is a target, ``auto``, or ``all`` for every target that is present and takes the bundle; a bundle
    ``against`` runs on the same one. ``precision`` is that of the bundle's engine, as in `load`. ``part`` is that of
    split bundles; None measures all of it, every query decoded. Inputs are the bundle's golden ones, or random.
    ``save`` keeps the figures in the bundle's report.json, where ``device="auto"`` and `package` look for them.

    Raises UsageError; DeviceError: no target takes it; and what `load` raises.
    """
    check_whole("runs", runs, _BLOCK, None, f"give {_BLOCK} or more")
    for given in (bundle, "" if against is None else against):
        check_kind("a side of the benchmark", given, (str, os.PathLike, Bundle), "the path of a bundle or an ONNX file")
    path = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    first = Side(str(path), device, part, threads, precision)
    if first.is_graph and precision is not None:
        raise UsageError(f"{path} has its own precision", "leave --precision out, or give a bundle")
    if first.is_graph and save:
        raise UsageError(f"{path} is not a bundle", "only a bundle has a report.json to save to")
    other = [] if against is None else [Side(str(Path(against)), device, part, threads)]
    opened, skipped = _open(_on_targets([first, *other], device), all_of_them=device == "all")
    try:
        fresh = [_measure_fresh(one.side) for one in opened]
        _measure(opened, -(-runs // _COUNTED), progress)
        medians = [one.medians() for one in opened]
        ratios = [{}, *(_ratio(own / medians[0]) for own in medians[1:])]
        measured = tuple(map(_measurement, opened, fresh, ratios))
    finally:
        for one in opened:
            one.runtime.close()
    if save:
        _save(path, [one for one, side in zip(measured, opened, strict=True) if side.side.path == str(path)])
    machine = f"{cpu_name()}, {available_cores()} cores, {' '.join(cpu_features()) or sys.platform}"
    ratio = _ratio(medians[0] / medians[1]) if other and device != "all" else {}
    return Bench(machine, len(opened[0].times), measured, skipped=skipped, **ratio)


class Side(msgspec.Struct, frozen=True):
    """A bundle or an ONNX file on a target."""

    path: str
    device: str
    part: str | None
    threads: int | None
    precision: Precision | None = None  # of the engine; a graph has its own

    @property
    def is_graph(self) -> bool:
        """An ONNX file rather than a bundle."""
        return self.path.endswith(".onnx") and Path(self.path).is_file()

    def open(self) -> Runtime:
        """Raises what `load` raises."""
        if self.is_graph:
            return load_onnx(self.path, self.device, self.threads)
        return load(self.path, self.device, self.part, self.threads, precision=self.precision)

    def golden(self, kind: Literal["input", "output"]) -> dict[str, Array]:
        """Arrays by name. A split bundle that is measured whole has the encoder's inputs and no outputs."""
        if self.is_graph:
            return {}
        bundle = open_bundle(self.path)
        if bundle.split and self.part is None and kind == "output":
            return {}
        first = "encoder" if bundle.split else next(iter(bundle.manifest.parts))
        return golden_arrays(bundle, self.part or first, kind)

    def feeds(self, runtime: Runtime) -> dict[str, Array]:
        """The golden inputs; random ones for inputs without."""
        golden, generator = self.golden("input"), np.random.default_rng(0)
        feeds = {}
        for spec in runtime.inputs:
            shape = tuple(dim if isinstance(dim, int) else spec.ranges.get(dim, (1, 1))[0] for dim in spec.shape)
            if spec.name in golden:
                feeds[spec.name] = golden[spec.name]
            elif spec.dtype == "float32":
                feeds[spec.name] = generator.normal(size=shape).astype(np.float32)
            else:
                feeds[spec.name] = np.full(shape, 0 if spec.values is None else spec.values[0], spec.dtype)
        return feeds


@dataclass
class _Opened:
    """A side, and milliseconds and calls per second as they are measured."""

    side: Side
    runtime: Runtime
    feeds: dict[str, Array]
    times: list[float] = field(default_factory=list)
    streamed: float = 0.0  # seconds of as many calls

    @property
    def batch(self) -> int:
        return len(next(iter(self.feeds.values())))

    def block(self) -> None:
        for count in range(_BLOCK):
            start = time.perf_counter()
            self.runtime.run(self.feeds)
            if count:
                self.times.append((time.perf_counter() - start) * 1e3)
        start = time.perf_counter()
        for _ in self.runtime.stream(repeat(self.feeds, _BLOCK)):
            pass
        self.streamed += time.perf_counter() - start

    def medians(self) -> Array:
        """Of each block, per sample, so that bundles of different batch sizes compare."""
        return np.asarray(np.median(np.reshape(self.times, (-1, _COUNTED)), axis=1) / self.batch)


def _on_targets(sides: list[Side], device: str) -> list[Side]:
    """The sides on every target that they run on; both on the same one, even if `auto` differs for the other."""
    if device == "all":
        targets = [found.target for found in devices()]
        return [msgspec.structs.replace(side, device=target) for side in sides for target in targets]
    if device == "auto":
        bundles = (side for side in sides if not side.is_graph)
        chosen = next((choose_target(open_bundle(side.path), side.precision) for side in bundles), "ort-cpu")
        return [msgspec.structs.replace(side, device="ort-cpu" if side.is_graph else chosen) for side in sides]
    return sides


def _open(sides: Sequence[Side], all_of_them: bool) -> tuple[list[_Opened], tuple[str, ...]]:
    """The sides that opened; for ``all`` targets also those that did not, with the reason."""
    opened, refused = [], []
    for side in sides:
        try:
            runtime = side.open()
            opened.append(_Opened(side, runtime, side.feeds(runtime)))
        except (DeviceError, EngineError) as error:
            if not all_of_them:
                raise
            refused.append(f"{side.device}: {error.message}")
    if not opened:
        raise DeviceError(f"no target takes {sides[0].path}: {'; '.join(refused)}", "see `perceiver-export doctor`")
    return opened, tuple(refused)


def _measure(sides: list[_Opened], blocks: int, progress: Callable[[int, int], None] | None) -> None:
    """Blocks of each side in turn, A A A A A B B B B B A …"""
    for side in sides:
        for _ in range(_WARMUP):
            side.runtime.run(side.feeds)
    for block in range(blocks):
        for side in sides:
            side.block()
        if progress is not None:
            progress(block + 1, blocks)


def _measurement(one: _Opened, fresh: tuple[float, float, float], ratio: dict[str, Any]) -> Measurement:
    described, golden, outputs = one.runtime.describe(), one.side.golden("output"), one.runtime.run(one.feeds)
    p50, p95, p99 = map(float, np.quantile(one.times, [0.5, 0.95, 0.99]))
    differences = [compare(outputs[name], golden[name], 0.0).difference for name in outputs if name in golden]
    compiled = described["compiled"]
    return Measurement(
        name=Path(one.side.path).name or one.side.path,
        target=described["target"],
        engine=f"{described['engine']} {described['version'].partition('-')[0]}",
        precision=described["precision"],
        # A figure that travels names its engine, not where that lay.
        compiled=Path(compiled).name if Path(compiled).is_absolute() else compiled.partition(",")[0],
        threads=str(described["threads"]),
        batch=one.batch,
        p50=p50,
        p95=p95,
        p99=p99,
        throughput=len(one.times) / _COUNTED * _BLOCK / one.streamed * one.batch,
        load=fresh[0],
        peak_memory=fresh[1],
        base_memory=fresh[2],
        difference=max(differences, default=None),
        tolerance=TOLERANCES.get(described["precision"]),
        certificates=described.get("certificates", ()),
        **ratio,
    )


def _ratio(pairs: Array) -> dict[str, Any]:
    low, median, high = map(float, np.quantile(pairs, [0.25, 0.5, 0.75]))
    return {"ratio": median, "ratio_quartiles": (low, high)}


def _save(bundle: Path, measured: list[Measurement]) -> None:
    new = {one.target: msgspec.to_builtins(one) for one in measured}

    def added(machines: Any) -> Any:
        before: dict[str, Any] = machines if isinstance(machines, dict) else {}
        here = before.get(cpu_name(), {})
        return {**before, cpu_name(): {**(here if isinstance(here, dict) else {}), **new}}

    change_report(bundle, "bench", added)


def _measure_fresh(side: Side) -> tuple[float, float, float]:
    """Load in milliseconds, and the process's MiB afterwards and before, in a process that does nothing else."""
    # Not `-m`, which would let a file of the current directory stand in for a library.
    code = f"import sys; sys.path.pop(0); from {__name__} import _main; _main(sys.argv[1])"
    command = [sys.executable, "-c", code, json.dumps(msgspec.to_builtins(side))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=tuple[float, float, float])
    except (IndexError, msgspec.DecodeError) as error:
        raise BundleError(
            f"{side.path} cannot be run in a process of its own", done.stderr.strip()[-500:] or "it died"
        ) from error


def _main(text: str) -> None:
    side = msgspec.convert(json.loads(text), Side)  # not msgspec's reader: file names may have any bytes
    # The library's own time and size are not the model's.
    find_target(side.device).backend().platform(side.device, EngineOptions())
    base, start = peak_memory(), time.perf_counter()
    runtime = side.open()
    seconds = time.perf_counter() - start
    feeds = side.feeds(runtime)
    for _ in range(_WARMUP):
        runtime.run(feeds)
    sys.stdout.write(json.dumps([seconds * 1e3, peak_memory(), base]))
