# SPDX-License-Identifier: Apache-2.0
"""Measure latency, throughput, load time, memory and the difference from PyTorch, of one model or several in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from perceiver_export.runtimes.bundle import Bundle, BundleLike, golden_arrays, open_bundle
from perceiver_export.runtimes.certificates import flagged
from perceiver_export.runtimes.engines.backend import EngineOptions, Precision, PrecisionChoice, find_target
from perceiver_export.runtimes.errors import BundleError, DeviceError, EngineError, UsageError, check_kind, check_whole
from perceiver_export.runtimes.figures import check_report, platform_of, save_figures, save_relative
from perceiver_export.runtimes.loading import load, load_onnx
from perceiver_export.runtimes.machine import available_cores, cpu_features, cpu_name, peak_memory
from perceiver_export.runtimes.manifest import TensorSpec
from perceiver_export.runtimes.presence import choose_target, devices
from perceiver_export.runtimes.runtime import Array, Runtime, compare, fastest, quartiles, scattered

# The largest difference from PyTorch's outputs, as a share of their scale. fp32 has export's tolerance; fp16 and bf16
# have more, because one rounding costs 2^-11 and 2^-8 instead of 2^-24, and errors add up over the layers.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1}
_BLOCK = 5  # consecutive runs of one side; the first of a block finds cold caches and is not counted
_COUNTED = _BLOCK - 1
_WARMUP = 3
_FEWEST = 5  # blocks that a comparison needs
_MOST = 120.0  # seconds after which `precision="auto"` stops once a comparison has enough blocks


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One side. Times are in milliseconds per call of ``batch`` samples; memory is in MiB of a fresh process.

    ``p50`` to ``p99`` are percentiles of calls; ``median`` and ``spread`` (quartiles) are those of the medians of
    blocks of calls. ``size``: MiB of the bundle's files. ``throughput``: samples per second with two requests in
    flight. ``peak_memory``: the peak resident size after load and runs; ``base_memory``: that of Python, numpy and the
    engine's library before the load. ``ratio``: the time per sample relative to the first side's, the median over
    pairs of blocks, with quartiles. ``difference``: the largest difference from PyTorch's golden outputs, as a share
    of their scale, NaN if an output has NaN; ``tolerance``: its limit. ``flags``: the flags of the engine's build.
    ``fastest``, ``unsteady``: as in `Bench`.
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
    median: float
    spread: tuple[float, float]
    throughput: float
    size: float
    load: float
    peak_memory: float
    base_memory: float
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    difference: float | None = None
    tolerance: float | None = None
    certificates: tuple[str, ...] = ()  # valid on this engine and machine
    platform: str = ""
    flags: dict[str, str] = {}
    fastest: bool = False
    unsteady: str = ""

    @property
    def within_tolerance(self) -> bool | None:
        """Whether outputs are as close to PyTorch's as the precision requires; None if there is nothing to compare."""
        if self.broken:
            return False
        if self.difference is None or self.tolerance is None:
            return None
        return self.difference <= self.tolerance

    @property
    def broken(self) -> bool:
        """Whether outputs have NaN or infinite values where PyTorch's have none."""
        return self.difference is not None and not np.isfinite(self.difference)


class Bench(msgspec.Struct, frozen=True):
    """``ratio``: with ``against``, the first side's time per sample divided by the second's, the median and quartiles.

    ``skipped``: for ``device="all"`` and ``precision="auto"``, which sides could not be opened, and why. ``fastest``:
    with several sides, the indices of the fastest, more than one if they tie. It is empty if ``unsteady`` says why the
    times cannot be compared.
    """

    machine: str
    runs: int
    measurements: tuple[Measurement, ...]
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    skipped: tuple[str, ...] = ()
    fastest: tuple[int, ...] = ()
    unsteady: str = ""


def bench(
    bundle: BundleLike,
    *,
    against: str | os.PathLike[str] | None = None,
    part: str | None = None,
    device: str = "auto",
    runs: int = 100,
    threads: int | None = None,
    precision: PrecisionChoice | None = None,
    against_precision: Precision | None = None,
    save: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Measure a bundle (or an ONNX file) alone, or several in alternating blocks under the same conditions.

    ``device`` is a target, ``auto``, or ``all`` for every target that can run the bundle here; a bundle ``against``
    runs on the same target. ``precision`` and ``against_precision`` are those of the engines, as in `load`;
    ``precision="auto"`` measures each bundle in fp32 (in an int8 bundle: for the layers that are not int8) and in every
    lower precision of the target, and stops after two minutes once there are enough calls to compare. ``part`` names
    one part of a split bundle; None measures the whole, with every query decoded. Inputs are the bundle's golden ones,
    or random. ``save`` keeps the figures in the bundle's report.json, where `package` and ``auto`` (as device or
    precision) look for them.

    Raises UsageError; DeviceError: no target can run the bundle; and what `load` raises.
    """
    check_whole("runs", runs, _BLOCK, None, f"give {_BLOCK} or more")
    path, several = bundle.path if isinstance(bundle, Bundle) else bundle, precision == "auto"
    given = [(path, None if precision == "auto" else precision)]
    given += [] if against is None else [(against, against_precision)]
    for place, _ in given:
        check_kind("a side of the benchmark", place, (str, os.PathLike), "the path of a bundle or an ONNX file")
    sides = _on_targets([Side(str(Path(place)), device, part, threads, asked) for place, asked in given], device)
    if sides[0].is_graph and (save or precision is not None):
        raise UsageError(
            f"{path} is a graph, which has its own precision and no report.json",
            "omit --precision and --save, or give a bundle",
        )
    if save and part is not None:
        raise UsageError(f"--save needs figures of the whole bundle, but --part is {part!r}", "omit one of them")
    if save:
        check_report(Path(path))
    if several:
        sides = [one for side in sides for one in _in_precisions(side)]
    opened, skipped = _open(sides, all_of_them=several or device == "all")
    measured, medians = _measure(opened, -(-runs // _COUNTED), _MOST if several else np.inf, progress)
    calls, compared = len(opened[0].times), len(measured) > 1
    undecided = unsteady(measured, calls if compared or save else _FEWEST * _COUNTED)
    sound = [index for index, one in enumerate(measured) if not one.broken]
    decides = sound and compared and not undecided
    best = tuple(sound[index] for index in fastest(np.stack(medians)[sound])) if decides else ()
    verdict = partial(msgspec.structs.replace, unsteady=undecided)
    measured = tuple(verdict(one, fastest=index in best) for index, one in enumerate(measured))
    if save:
        _keep(sides, list(zip(opened, measured, medians, strict=True)), several)
    machine = f"{cpu_name()}, {available_cores()} cores, {' '.join(cpu_features()) or sys.platform}"
    ratio = _ratio(medians[0] / medians[1]) if against is not None and not several and device != "all" else {}
    return Bench(machine, calls, measured, skipped=skipped, fastest=best, unsteady=undecided, **ratio)


def unsteady(measured: Sequence[Measurement], runs: int) -> str:
    """Why the times cannot be compared: too few calls, or a busy or throttled machine; empty if they can."""
    if runs < _FEWEST * _COUNTED:
        return f"{runs} calls are too few; give --runs {_FEWEST * _COUNTED} or more"
    names = (f"{one.name} in {one.precision}{flagged(one.flags)} on {one.target}" for one in measured)
    found = (scattered(who, one.spread[0], one.median, one.spread[1]) for who, one in zip(names, measured, strict=True))
    return next(filter(None, found), "")


class Side(msgspec.Struct, frozen=True):
    """A bundle or an ONNX file on a target."""

    path: str
    device: str
    part: str | None
    threads: int | None
    precision: Precision | None = None  # of the engine; a graph has its own

    @property
    def is_graph(self) -> bool:
        """Whether it is an ONNX file rather than a bundle."""
        return self.path.endswith(".onnx") and Path(self.path).is_file()

    @property
    def num_bytes(self) -> int:
        """The size of the bundle's files; of a graph, without external weights."""
        return Path(self.path).stat().st_size if self.is_graph else open_bundle(self.path, "never").num_bytes

    def open(self) -> Runtime:
        """Raises what `load` raises."""
        if self.is_graph:
            return load_onnx(self.path, self.device, self.threads)
        return load(self.path, self.device, self.part, self.threads, precision=self.precision)

    def golden(self, kind: Literal["input", "output"]) -> dict[str, Array]:
        """The golden arrays by name. For a whole split bundle, these are the encoder's inputs, and no outputs."""
        if self.is_graph:
            return {}
        bundle = open_bundle(self.path)
        if bundle.split and self.part is None and kind == "output":
            return {}
        first = "encoder" if bundle.split else next(iter(bundle.manifest.parts))
        return golden_arrays(bundle, self.part or first, kind)

    def feeds(self, inputs: Sequence[TensorSpec]) -> dict[str, Array]:
        """The golden inputs, or random floats and constant integers where there are none."""
        golden, generator = self.golden("input"), np.random.default_rng(0)
        feeds = {}
        for spec in inputs:
            shape = tuple(spec.limits(axis)[0] for axis in range(len(spec.shape)))
            if spec.name in golden:
                feeds[spec.name] = golden[spec.name]
            elif spec.dtype == "float32":
                feeds[spec.name] = generator.normal(size=shape).astype(np.float32)
            else:
                feeds[spec.name] = np.full(shape, 0 if spec.values is None else spec.values[0], spec.dtype)
        return feeds


@dataclass
class _Opened:
    """An opened side with its times so far, in milliseconds."""

    side: Side
    runtime: Runtime
    feeds: dict[str, Array]
    times: list[float] = field(default_factory=list)
    streamed: float = 0.0  # seconds of all streamed calls

    @property
    def batch(self) -> int:
        return next((len(array) for array in self.feeds.values() if array.ndim), 1)

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
        """The median of each block, per sample, so that bundles of different batch sizes can be compared."""
        return np.asarray(np.median(np.reshape(self.times, (-1, _COUNTED)), axis=1) / self.batch)


def _on_targets(sides: list[Side], device: str) -> list[Side]:
    """The sides on their targets: both on the same one, even if `auto` would choose another for the second."""
    if device == "all":
        targets = [found.target for found in devices()]
        return [msgspec.structs.replace(side, device=target) for side in sides for target in targets]
    if device == "auto":
        first = next((side for side in sides if not side.is_graph), None)
        chosen = choose_target(open_bundle(first.path), first.precision, first.threads) if first else "ort-cpu"
        return [msgspec.structs.replace(side, device="ort-cpu" if side.is_graph else chosen) for side in sides]
    return sides


def _in_precisions(side: Side) -> list[Side]:
    """A bundle in fp32 and in every lower precision of its target; a graph unchanged."""
    if side.is_graph:
        return [side]
    lower = find_target(side.device).backend().precisions(side.device)
    return [msgspec.structs.replace(side, precision=precision) for precision in ("fp32", *lower)]


def _open(sides: Sequence[Side], all_of_them: bool) -> tuple[list[_Opened], tuple[str, ...]]:
    """The sides that could be opened and, with ``all_of_them``, why the others could not."""
    opened, refused = [], []
    for side in sides:
        try:
            runtime = side.open()
            opened.append(_Opened(side, runtime, side.feeds(runtime.inputs)))
        except (DeviceError, EngineError) as error:
            if not all_of_them:
                raise
            asked = f" in {side.precision}" if side.precision else ""
            refused.append(f"{side.device}{asked}: {error.message}")
    if not opened:
        raise DeviceError(f"no target can run {sides[0].path}: {'; '.join(refused)}", "run `perceiver-export doctor`")
    return opened, tuple(refused)


def _measure(
    sides: list[_Opened], blocks: int, most: float, progress: Callable[[int, int], None] | None
) -> tuple[tuple[Measurement, ...], list[Array]]:
    """Measure the sides in alternating blocks (A A A A A B B B B B A …): their figures and the medians of their blocks.

    It stops after ``most`` seconds once a comparison has enough blocks, and closes the sides.
    """
    try:
        fresh = [_measure_fresh(one.side) for one in sides]
        for side in sides:
            for _ in range(_WARMUP):
                side.runtime.run(side.feeds)
        start = time.perf_counter()
        for block in range(blocks):
            if block >= _FEWEST and time.perf_counter() - start > most:
                break
            for side in sides:
                side.block()
            if progress is not None:
                progress(block + 1, blocks)
        medians = [one.medians() for one in sides]
        ratios = [{}, *(_ratio(own / medians[0]) for own in medians[1:])]
        return tuple(map(_measurement, sides, fresh, ratios)), medians
    finally:
        for one in sides:
            one.runtime.close()


def _measurement(one: _Opened, fresh: tuple[float, float, float], ratio: dict[str, Any]) -> Measurement:
    described, golden, outputs = one.runtime.describe(), one.side.golden("output"), one.runtime.run(one.feeds)
    p50, p95, p99 = map(float, np.quantile(one.times, [0.5, 0.95, 0.99]))
    low, median, high = quartiles(one.medians() * one.batch)
    differences = [compare(outputs[name], golden[name], 0.0).difference for name in outputs if name in golden]
    compiled = described["compiled"]
    return Measurement(
        name=Path(one.side.path).name or one.side.path,
        target=described["target"],
        engine=f"{described['engine']} {described['version'].partition('-')[0]}",
        precision=described["precision"],
        # Saved figures name the engine without its directory, which differs between machines.
        compiled=Path(compiled).name if os.path.isdir(compiled) else compiled.partition(",")[0],
        threads=str(described["threads"]),
        batch=one.batch,
        p50=p50,
        p95=p95,
        p99=p99,
        median=median,
        spread=(low, high),
        size=one.side.num_bytes / 2**20,
        throughput=len(one.times) / _COUNTED * _BLOCK / one.streamed * one.batch,
        load=fresh[0],
        peak_memory=fresh[1],
        base_memory=fresh[2],
        difference=float(np.max(differences)) if differences else None,  # NaN wins
        tolerance=TOLERANCES.get(described["precision"]),
        certificates=described.get("certificates", ()),
        platform=platform_of(one.side.device),
        flags=described.get("flags", {}),
        **ratio,
    )


def _ratio(pairs: Array) -> dict[str, Any]:
    low, median, high = quartiles(pairs)
    return {"ratio": median, "ratio_quartiles": (low, high)}


def _keep(sides: Sequence[Side], rows: Sequence[tuple[_Opened, Measurement, Array]], several: bool) -> None:
    """Save the figures of the first bundle's sides and, for ``several`` precisions, their times relative to fp32's."""
    path = sides[0].path
    own = [row for row in rows if row[0].side.path == path]
    save_figures(Path(path), "bench", {figures.target: figures for _, figures, _ in reversed(own)})  # of several fp32's
    if several:
        sound = [(one.side, times) for one, figures, times in own if not (figures.unsteady or figures.broken)]
        timed = [(side.device, str(side.precision), times) for side, times in sound]
        save_relative(Path(path), [side.device for side in sides if side.path == path], sides[0].threads, timed)


def _measure_fresh(side: Side) -> tuple[float, float, float]:
    """Milliseconds to load in a fresh process, and the process's peak MiB after warm-up runs and before the load."""
    # `-m` would let a file in the current directory replace a library.
    code = f"import sys; sys.path.pop(0); from {__name__} import _main; _main(sys.argv[1])"
    command = [sys.executable, "-c", code, json.dumps(msgspec.to_builtins(side))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=tuple[float, float, float])
    except (IndexError, msgspec.DecodeError) as error:
        hint = done.stderr.strip()[-500:] or "check whether the system killed it because memory ran out"
        raise BundleError(f"{side.path} cannot be run in its own process", hint) from error


def _main(text: str) -> None:
    side = msgspec.convert(json.loads(text), Side)  # not msgspec's decoder: file names may have any bytes
    # Load the library first, so that its time and memory do not count as the model's.
    find_target(side.device).backend().platform(side.device, EngineOptions())
    base, start = peak_memory(), time.perf_counter()
    runtime = side.open()
    seconds = time.perf_counter() - start
    feeds = side.feeds(runtime.inputs)
    for _ in range(_WARMUP):
        runtime.run(feeds)
    sys.stdout.write(json.dumps([seconds * 1e3, peak_memory(), base]))
