# SPDX-License-Identifier: Apache-2.0
"""Two calls in flight against the engine's own asynchronous calls; answers and memory of 20,000 calls from 8 threads.

    python -m tests.benchmarks.serving [--calls 20000] [--blocks 40]

The model is the demo's. Throughput is measured in blocks of 40 calls, the sides in turn, and compared pair by pair. The
engine's own calls are two threads in `session.run`, or `session.run_async` with two in flight (ONNX Runtime), and an
`AsyncInferQueue` of two requests (OpenVINO). A process that never loaded torch makes the 20,000 calls; its resident
memory is read after each fifth of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from perceiver_export.runtimes import Runtime, devices, load
from perceiver_export.runtimes.runtime import Feeds
from tests.benchmarks.harness import FASHION, Row, command, fresh, medians, seconds_in_turn

_CALLS = 40
_THREADS = 8
_FIFTHS = 5


def measure(work: Path, calls: int = 20_000, blocks: int = 40) -> Iterator[Row]:
    from perceiver_export.exporter import export

    bundle = export(FASHION / "checkpoint", work / "fashion")
    for device in devices():
        with load(bundle, device.target) as runtime:
            yield {"target": device.target, **throughput(runtime, blocks)}
    for device in devices():
        yield {
            "target": device.target,
            "calls": calls,
            "MiB by fifths": fresh(hammer, bundle.path, device.target, calls),
        }


def throughput(runtime: Runtime, blocks: int) -> Row:
    """Calls per second of every side, and the ratio of ours to the best other, pair by pair, with quartiles."""
    feeds = {"image": np.random.default_rng(0).normal(size=(1, 3, 28, 28)).astype(np.float32)}
    found = seconds_in_turn({"stream": partial(stream, runtime, feeds), **own_sides(runtime, feeds)}, blocks)
    rates = {name: _CALLS / median for name, median in medians(found).items()}
    best = max((name for name in rates if name != "stream"), key=lambda name: rates[name])
    ratios = np.array(found[best]) / found["stream"]
    low, middle, high = (float(value) for value in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return {"calls a second": rates, "best": best, "stream over best": middle, "quartiles": [low, high]}


def stream(runtime: Runtime, feeds: Feeds) -> None:
    for _ in runtime.stream(repeat(feeds, _CALLS)):
        pass


def own_sides(runtime: Runtime, feeds: Feeds) -> dict[str, Callable[[], None]]:
    """The engine's own ways to keep two calls in flight."""
    engine: Any = runtime._engine
    if hasattr(engine, "_compiled"):
        from openvino import AsyncInferQueue

        queue = AsyncInferQueue(engine._compiled, 2)

        def infer_queue() -> None:
            for _ in range(_CALLS):
                queue.start_async(feeds, share_inputs=True)
            queue.wait_all()

        return {"AsyncInferQueue": infer_queue}
    session, pool = engine._session, ThreadPoolExecutor(2)

    def two_threads() -> None:
        list(pool.map(lambda _: session.run(None, feeds), range(_CALLS)))

    def run_async() -> None:
        slots = threading.Semaphore(2)
        for _ in range(_CALLS):
            slots.acquire()
            session.run_async(None, feeds, lambda results, data, error: slots.release(), None)
        for _ in range(2):
            slots.acquire()

    return {"two threads": two_threads, "run_async": run_async}


def hammer(bundle: str, target: str, calls: int) -> list[float]:
    """Eight threads call and submit, each with its own image; MiB after each fifth. A wrong answer ends the process."""
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


if __name__ == "__main__":
    command(measure)
