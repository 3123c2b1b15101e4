# SPDX-License-Identifier: Apache-2.0
"""Latency, throughput, load time and memory; a ratio where two are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.errors import BundleError, UsageError
from perceiver_export.runtimes.loading import load, load_onnx
from perceiver_export.runtimes.machine import available_cores, cpu_features, cpu_name
from perceiver_export.runtimes.manifest import TensorSpec
from perceiver_export.runtimes.runtime import Array, Runtime

_BLOCK = 5  # runs in a row of one side; the first of a block finds cold caches and is not counted
_WARMUP = 3


class Measurement(msgspec.Struct, frozen=True):
    """One side. Times in milliseconds a call of ``batch`` samples; memory in MiB, of a fresh process.

    ``peak_memory`` is the process's largest resident size after load and runs; ``base_memory`` what Python, numpy and
    the engine's library took before the load.
    """

    name: str
    target: str
    engine: str
    threads: str
    batch: int
    p50: float
    p95: float
    p99: float
    throughput: float
    load: float
    peak_memory: float
    base_memory: float
    certificates: tuple[str, ...] = ()  # that hold on this engine and machine


class Bench(msgspec.Struct, frozen=True):
    """``ratio``: median over pairs of blocks of the first side's time a sample by the second's, with its quartiles."""

    machine: str
    runs: int
    measurements: tuple[Measurement, ...]
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None


def bench(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    against: str | os.PathLike[str] | None = None,
    part: str | None = None,
    device: str = "auto",
    runs: int = 100,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Measure a bundle (or an ONNX file), alone or in turn with another, on the same machine in the same minutes.

    ``part`` is that of split bundles; None measures all of it, every query decoded. Inputs are the bundle's golden
    ones, random where there are none. Raises UsageError and what `load` raises.
    """
    if runs < _BLOCK:
        raise UsageError(f"runs is {runs}", f"give {_BLOCK} or more")
    path = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    paths = [path] if against is None else [path, Path(against)]
    runtimes = [_open(path, device, part, threads) for path in paths]
    try:
        fresh = [_fresh(path, device, part, threads) for path in paths]
        feeds = [_feeds(path, part, runtime) for path, runtime in zip(paths, runtimes, strict=True)]
        times = _interleaved(runtimes, feeds, runs, progress)
        measured = tuple(_measurement(*side) for side in zip(paths, runtimes, feeds, times, fresh, strict=True))
    finally:
        for runtime in runtimes:
            runtime.close()
    machine = f"{cpu_name()}, {available_cores()} cores, {' '.join(cpu_features()) or sys.platform}"
    if against is None:
        return Bench(machine, len(times[0]), measured)
    # A sample's time, so that bundles of different batch sizes compare.
    blocks = [_block_medians(side) / each.batch for side, each in zip(times, measured, strict=True)]
    ratios = blocks[0] / blocks[1]
    low, high = np.quantile(ratios, [0.25, 0.75])
    return Bench(machine, len(times[0]), measured, float(np.median(ratios)), (float(low), float(high)))


def _block_medians(times: list[float]) -> Array:
    counted = _BLOCK - 1
    return np.array([np.median(times[start : start + counted]) for start in range(0, len(times), counted)])


def _interleaved(
    runtimes: list[Runtime], feeds: list[dict[str, Array]], runs: int, progress: Callable[[int, int], None] | None
) -> list[list[float]]:
    """Milliseconds of each counted call, side by side in blocks: A A A A A B B B B B A …"""
    for runtime, arrays in zip(runtimes, feeds, strict=True):
        for _ in range(_WARMUP):
            runtime.run(arrays)
    times: list[list[float]] = [[] for _ in runtimes]
    blocks = -(-runs // (_BLOCK - 1))
    for block in range(blocks):
        for runtime, arrays, side in zip(runtimes, feeds, times, strict=True):
            for index in range(_BLOCK):
                start = time.perf_counter()
                runtime.run(arrays)
                if index:
                    side.append((time.perf_counter() - start) * 1e3)
        if progress is not None:
            progress(block + 1, blocks)
    return times


def _measurement(
    path: Path, runtime: Runtime, feeds: dict[str, Array], times: list[float], fresh: dict[str, float]
) -> Measurement:
    described = runtime.describe()
    batch = next(iter(feeds.values())).shape[0]
    p50, p95, p99 = np.quantile(times, [0.5, 0.95, 0.99])
    return Measurement(
        name=path.name or str(path),
        target=described["target"],
        engine=f"{described['engine']} {described['version']}",
        threads=str(described["threads"]),
        batch=batch,
        p50=float(p50),
        p95=float(p95),
        p99=float(p99),
        throughput=float(batch * len(times) / (sum(times) / 1e3)),
        load=fresh["load"],
        peak_memory=fresh["peak"],
        base_memory=fresh["base"],
        certificates=described.get("certificates", ()),
    )


def _open(path: Path, device: str, part: str | None, threads: int | None) -> Runtime:
    if path.suffix == ".onnx" and path.is_file():
        return load_onnx(path, device, threads)
    return load(path, device, part, threads)


def _feeds(path: Path, part: str | None, runtime: Runtime) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    feeds = {spec.name: _random(spec, generator) for spec in runtime.inputs}
    if path.is_dir() and "golden.npz" in open_bundle(path).manifest.files:
        with np.load(path / "golden.npz", allow_pickle=False) as golden:
            for name in feeds:
                key = f"{part or 'encoder'}/input/{name}" if open_bundle(path).split else f"input/{name}"
                feeds[name] = golden[key] if key in golden else feeds[name]
    return feeds


def _random(spec: TensorSpec, generator: np.random.Generator) -> Array:
    shape = tuple(dim if isinstance(dim, int) else spec.ranges.get(dim, (1, 1))[0] for dim in spec.shape)
    if spec.dtype == "float32":
        return generator.normal(size=shape).astype(np.float32)
    return np.zeros(shape, spec.dtype)


def _fresh(path: Path, device: str, part: str | None, threads: int | None) -> dict[str, float]:
    """Load time and memory, in a process that has done nothing else."""
    # Not `-m`, which would let a file of the current directory stand in for a library.
    code = f"import sys; sys.path.pop(0); from {__name__} import _main; _main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(path.resolve()), device, part or "", str(threads or 0)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise BundleError(
            f"{path} cannot be run in a process of its own", done.stderr.strip()[-500:] or "it died"
        ) from error
    return answer


def _main(path: str, device: str, part: str, threads: str) -> None:
    import onnxruntime  # noqa: F401  the library's own size is not the model's

    base = _peak_memory()
    start = time.perf_counter()
    runtime = _open(Path(path), device, part or None, int(threads) or None)
    seconds = time.perf_counter() - start
    feeds = _feeds(Path(path), part or None, runtime)
    for _ in range(_WARMUP):
        runtime.run(feeds)
    sys.stdout.write(json.dumps({"load": seconds * 1e3, "peak": _peak_memory(), "base": base}))


def _peak_memory() -> float:
    """MiB. From /proc where there is one: getrusage's figure survives exec, so it would start with the parent's."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
