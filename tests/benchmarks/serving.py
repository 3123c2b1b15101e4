# SPDX-License-Identifier: Apache-2.0
"""Two in flight against the engine's own asynchronous calls; and 20,000 calls from 8 threads: right, and no growth.

    python tests/benchmarks/serving.py [--calls 20000] [--blocks 40] [--json]

The model is the demo's. Throughput is measured in blocks of 40 calls, the sides in turn, and compared pair by pair. The
engine's own are two threads in `session.run` and `session.run_async` with two on their way (ONNX Runtime), and
`AsyncInferQueue` of two requests (OpenVINO). The 20,000 calls are made in a process that never loaded torch; its
resident memory is looked at after each fifth of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from perceiver_export.runtimes import Runtime, devices, load
from perceiver_export.runtimes.runtime import Feeds

_CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist" / "checkpoint"
_CALLS = 40
_THREADS = 8
_FIFTHS = 5
Side = Callable[[int], None]


def ours(runtime: Runtime, feeds: Feeds) -> Side:
    """`Runtime.stream`, two in flight."""

    def calls(count: int) -> None:
        for _ in runtime.stream(repeat(feeds, count)):
            pass

    return calls


def own_sides(runtime: Runtime, feeds: Feeds) -> dict[str, Side]:
    """The engine's own ways to have two in flight."""
    engine: Any = runtime._engine
    if hasattr(engine, "_compiled"):
        from openvino import AsyncInferQueue

        queue = AsyncInferQueue(engine._compiled, 2)

        def infer_queue(count: int) -> None:
            for _ in range(count):
                queue.start_async(feeds, share_inputs=True)
            queue.wait_all()

        return {"AsyncInferQueue": infer_queue}
    session, pool = engine._session, ThreadPoolExecutor(2)

    def two_threads(count: int) -> None:
        list(pool.map(lambda _: session.run(None, feeds), range(count)))

    def run_async(count: int) -> None:
        slots = threading.Semaphore(2)
        for _ in range(count):
            slots.acquire()
            session.run_async(None, feeds, lambda results, data, error: slots.release(), None)
        for _ in range(2):
            slots.acquire()

    return {"two threads": two_threads, "run_async": run_async}


def throughput(runtime: Runtime, feeds: Feeds, blocks: int) -> dict[str, Any]:
    """Calls a second of each side, and ours relative to the best of the engine's own: median over pairs, quartiles."""
    sides = {"stream": ours(runtime, feeds), **own_sides(runtime, feeds)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(_CALLS)
    for _ in range(blocks):
        for name, side in sides.items():
            start = time.perf_counter()
            side(_CALLS)
            seconds[name].append(time.perf_counter() - start)
    best = min((name for name in sides if name != "stream"), key=lambda name: float(np.median(seconds[name])))
    pairs = np.array(seconds[best]) / np.array(seconds["stream"])
    return {
        "calls a second": {name: _CALLS / float(np.median(values)) for name, values in seconds.items()},
        "best": best,
        "ratio": float(np.median(pairs)),
        "quartiles": [float(value) for value in np.quantile(pairs, [0.25, 0.75])],
    }


def hammer(bundle: str, target: str, calls: int) -> list[float]:
    """Eight threads, each with an image of its own, calling and submitting; MiB after each fifth of the calls.

    A wrong answer ends the process.
    """
    images = np.random.default_rng(0).normal(size=(_THREADS, 1, 3, 28, 28)).astype(np.float32)
    with load(bundle, target) as runtime, ThreadPoolExecutor(_THREADS) as pool:
        expected = [runtime.run({"image": image})["logits"] for image in images]

        def work(index: int) -> None:
            for call in range(calls // _THREADS // _FIFTHS):
                feeds = {"image": images[index]}
                answer = runtime.submit(feeds).result() if call % 4 == 0 else runtime.run(feeds)
                if not np.array_equal(answer["logits"], expected[index]):
                    raise SystemExit(f"thread {index} got a wrong answer at call {call}")

        memory = []
        for _ in range(_FIFTHS):
            list(pool.map(work, range(_THREADS)))
            memory.append(psutil.Process().memory_info().rss / 2**20)
    return memory


def hammer_apart(bundle: str, target: str, calls: int) -> list[float]:
    """`hammer` in a process of its own."""
    command = [sys.executable, __file__, "--hammer", bundle, target, str(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(value) for value in json.loads(done.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hammer", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hammer:
        bundle, target, calls = arguments.hammer
        print(json.dumps(hammer(bundle, target, int(calls))))
        return
    from perceiver_export.exporter import export

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        bundle = export(_CHECKPOINT, Path(directory) / "fashion")
        feeds = {"image": np.random.default_rng(0).normal(size=(1, 3, 28, 28)).astype(np.float32)}
        for device in devices():
            with load(bundle, device.target) as runtime:
                measured = throughput(runtime, feeds, arguments.blocks)
            memory = hammer_apart(str(bundle.path), device.target, arguments.calls)
            results[device.target] = {"throughput": measured, "MiB": memory}
    if arguments.json:
        print(json.dumps(results))
        return
    for target, result in results.items():
        measured = result["throughput"]
        rates = ", ".join(f"{name} {rate:.0f}/s" for name, rate in measured["calls a second"].items())
        low, high = measured["quartiles"]
        ratio = f"stream / {measured['best']} {measured['ratio']:.3f} ({low:.3f} to {high:.3f})"
        print(f"{target:13s} two in flight: {rates}; {ratio}")
        fifths = ", ".join(f"{value:.1f}" for value in result["MiB"])
        print(f"{target:13s} {arguments.calls:,} calls from {_THREADS} threads, every answer right; MiB: {fifths}")


if __name__ == "__main__":
    main()
