# SPDX-License-Identifier: Apache-2.0
"""Latency, throughput, load time, memory, distance from torch and energy; ratios where several are compared."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path

import msgspec
import numpy as np

from perceiver_export.runtimes.bench_sides import (
    TOLERANCES,
    Side,
    difference_from_golden,
    open_side,
    side_feeds,
)
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.energy import Meter, find_meter
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.errors import DeviceError, EngineError, UsageError
from perceiver_export.runtimes.fresh_process import Fresh, measure_fresh
from perceiver_export.runtimes.machine import available_cores, cpu_features, cpu_name
from perceiver_export.runtimes.presence import choose_target, devices
from perceiver_export.runtimes.report import read_report, update_report
from perceiver_export.runtimes.runtime import Array, Runtime

_BLOCK = 5  # runs in a row of one side; the first of a block finds cold caches and is not counted
_WARMUP = 3
_ENERGY_SECONDS = 10.0  # a Jetson's sensors and governors need as long to settle


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One side. Times in milliseconds a call of ``batch`` samples; memory in MiB, of a fresh process.

    ``throughput`` is samples a second with two requests in flight. ``peak_memory`` is the process's largest resident
    size after load and runs; ``base_memory`` what Python, numpy and the engine's library took before the load.
    ``ratio`` is the time of a sample relative to the first side's, the median over pairs of blocks, with quartiles.
    ``difference`` is the largest from torch's golden outputs, as a share of their scale; ``tolerance`` what the
    precision allows. ``joules`` are of one sample, idle power included; ``idle_watts`` were drawn before.
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
    joules: float | None = None
    idle_watts: float | None = None
    energy_source: str | None = None
    certificates: tuple[str, ...] = ()  # that hold on this engine and machine

    @property
    def within_tolerance(self) -> bool | None:
        """Whether outputs are as near to torch's as the precision allows; None where nothing says so."""
        if self.difference is None or self.tolerance is None:
            return None
        return self.difference <= self.tolerance


class Bench(msgspec.Struct, frozen=True):
    """``ratio``: with ``against``, the median of the first side's time a sample by the second's, with its quartiles.

    ``skipped``: of ``device="all"``, the targets that did not take the bundle, and why.
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
    energy: bool = False,
    save: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Measure a bundle (or an ONNX file), alone or in turn with others, on the same machine in the same minutes.

    ``device`` is a target, ``auto``, or ``all`` for every target that is present and takes the bundle; a bundle
    ``against`` runs on the same one. ``precision`` is that of the bundle's engine, as in `load`. ``part`` is that of
    split bundles; None measures all of it, every query decoded. Inputs are the bundle's golden ones, random where
    there are none. ``energy`` measures 10 s more a side; ``save`` keeps the figures in the bundle's report.json, where
    ``device="auto"`` and `package` look for them.

    Raises UsageError, DeviceError (no target takes it; no power rails) and what `load` raises.
    """
    if runs < _BLOCK:
        raise UsageError(f"runs is {runs}", f"give {_BLOCK} or more")
    path = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    meter = find_meter() if energy else None
    wishes = _wished(path, None if against is None else Path(against), device, part, threads, precision)
    sides, runtimes, skipped = _open_sides(wishes, all_of_them=device == "all")
    if save and sides[0].is_graph:
        raise UsageError(f"{path} is no bundle", "only a bundle has a report.json to save to")
    try:
        feeds = [side_feeds(side, runtime) for side, runtime in zip(sides, runtimes, strict=True)]
        fresh = [measure_fresh(side) for side in sides]
        times, rates = _interleaved(runtimes, feeds, runs, progress)
        joules = [None if meter is None else _energy(meter, *one) for one in zip(runtimes, feeds, strict=True)]
        measured = [_measurement(*one) for one in zip(sides, runtimes, feeds, times, rates, fresh, joules, strict=True)]
    finally:
        for runtime in runtimes:
            runtime.close()
    result = _compared(measured, times, skipped, paired=against is not None and device != "all")
    if save:
        _save(path, [one for one, side in zip(result.measurements, sides, strict=True) if side.path == str(path)])
    return result


def _wished(
    path: Path, against: Path | None, device: str, part: str | None, threads: int | None, precision: Precision | None
) -> list[Side]:
    """What to open: a bundle that is compared with another on the same targets, whatever `auto` is for the other."""
    first = Side(str(path), device, part, threads, precision)
    if precision is not None and first.is_graph:
        raise UsageError(f"{path} runs in the precision that it is in", "leave --precision out, or give a bundle")
    sides = [first] if against is None else [first, Side(str(against), device, part, threads)]
    if device == "all":
        targets = [found.target for found in devices()]
        return [msgspec.structs.replace(side, device=target) for side in sides for target in targets]
    if device == "auto":
        chosen = next((choose_target(open_bundle(side.path)) for side in sides if not side.is_graph), "ort-cpu")
        return [msgspec.structs.replace(side, device="ort-cpu" if side.is_graph else chosen) for side in sides]
    return sides


def _open_sides(wishes: Sequence[Side], all_of_them: bool) -> tuple[list[Side], list[Runtime], tuple[str, ...]]:
    """The sides that opened, with their runtimes, and of ``all`` targets those that did not, with the reason."""
    sides, runtimes, refused = [], [], []
    for side in wishes:
        try:
            runtimes.append(open_side(side))
        except (DeviceError, EngineError) as error:
            if not all_of_them:
                raise
            refused.append(f"{side.device}: {error.message}")
            continue
        sides.append(side)
    if not sides:
        raise DeviceError(f"no target takes {wishes[0].path}: {'; '.join(refused)}", "see `perceiver-export doctor`")
    return sides, runtimes, tuple(refused)


def _interleaved(
    runtimes: list[Runtime],
    feeds: list[dict[str, Array]],
    runs: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[list[float]], list[float]]:
    """Milliseconds of each counted call, side by side in blocks, A A A A A B B B B B A …; and calls a second with two
    in flight, in blocks of the same length.
    """
    for runtime, arrays in zip(runtimes, feeds, strict=True):
        for _ in range(_WARMUP):
            runtime.run(arrays)
    times: list[list[float]] = [[] for _ in runtimes]
    streamed = [0.0 for _ in runtimes]
    blocks = -(-runs // (_BLOCK - 1))
    for block in range(blocks):
        for index, (runtime, arrays) in enumerate(zip(runtimes, feeds, strict=True)):
            times[index] += list(_timed(runtime, arrays))[1:]
            start = time.perf_counter()
            for _ in runtime.stream(repeat(arrays, _BLOCK)):
                pass
            streamed[index] += time.perf_counter() - start
        if progress is not None:
            progress(block + 1, blocks)
    return times, [blocks * _BLOCK / seconds for seconds in streamed]


def _timed(runtime: Runtime, arrays: dict[str, Array]) -> Iterator[float]:
    for _ in range(_BLOCK):
        start = time.perf_counter()
        runtime.run(arrays)
        yield (time.perf_counter() - start) * 1e3


def _energy(meter: Meter, runtime: Runtime, feeds: dict[str, Array]) -> tuple[float, float, str]:
    """Joules a call over 10 s of calls, the watts of 3 s before without any, and what was measured."""
    with meter.measure() as idle:
        time.sleep(_ENERGY_SECONDS * 0.3)
    calls, end = 0, time.perf_counter() + _ENERGY_SECONDS
    with meter.measure() as used:
        while time.perf_counter() < end:
            runtime.run(feeds)
            calls += 1
    return used.joules / calls, idle.watts, used.source


def _measurement(
    side: Side,
    runtime: Runtime,
    feeds: dict[str, Array],
    times: list[float],
    rate: float,
    fresh: Fresh,
    energy: tuple[float, float, str] | None,
) -> Measurement:
    described = runtime.describe()
    batch = next(iter(feeds.values())).shape[0]
    p50, p95, p99 = (float(value) for value in np.quantile(times, [0.5, 0.95, 0.99]))
    joules, idle, source = energy if energy is not None else (None, None, None)
    return Measurement(
        name=Path(side.path).name or side.path,
        target=described["target"],
        engine=f"{described['engine']} {described['version'].partition('-')[0]}",
        precision=described["precision"],
        compiled=_engine_key(described["compiled"]),
        threads=str(described["threads"]),
        batch=batch,
        p50=p50,
        p95=p95,
        p99=p99,
        throughput=rate * batch,
        load=fresh.load,
        peak_memory=fresh.peak,
        base_memory=fresh.base,
        difference=difference_from_golden(side, runtime.run(feeds)),
        tolerance=TOLERANCES.get(described["precision"]),
        joules=None if joules is None else joules / batch,
        idle_watts=idle,
        energy_source=source,
        certificates=described.get("certificates", ()),
    )


def _engine_key(compiled: str) -> str:
    """A figure that travels says which engine it is of, not where that lay."""
    return Path(compiled).name if Path(compiled).is_absolute() else compiled.partition(",")[0]


def _compared(measured: list[Measurement], times: list[list[float]], skipped: tuple[str, ...], paired: bool) -> Bench:
    """Ratios of a sample's time, so that bundles of different batch sizes compare."""
    machine = f"{cpu_name()}, {available_cores()} cores, {' '.join(cpu_features()) or sys.platform}"
    blocks = [_block_medians(side) / each.batch for side, each in zip(times, measured, strict=True)]
    for index in range(1, len(measured)):
        ratio, quartiles = _ratio(blocks[index] / blocks[0])
        measured[index] = msgspec.structs.replace(measured[index], ratio=ratio, ratio_quartiles=quartiles)
    result = Bench(machine, len(times[0]), tuple(measured), skipped=skipped)
    if not paired:
        return result
    ratio, quartiles = _ratio(blocks[0] / blocks[1])
    return msgspec.structs.replace(result, ratio=ratio, ratio_quartiles=quartiles)


def _ratio(pairs: Array) -> tuple[float, tuple[float, float]]:
    low, median, high = np.quantile(pairs, [0.25, 0.5, 0.75])
    return float(median), (float(low), float(high))


def _block_medians(times: list[float]) -> Array:
    counted = _BLOCK - 1
    return np.array([np.median(times[start : start + counted]) for start in range(0, len(times), counted)])


def _save(bundle: Path, measured: list[Measurement]) -> None:
    machines = read_report(bundle).get("bench", {})
    here = {**machines.get(cpu_name(), {}), **{one.target: msgspec.to_builtins(one) for one in measured}}
    update_report(bundle, "bench", {**machines, cpu_name(): here})
