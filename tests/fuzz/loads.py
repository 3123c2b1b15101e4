# SPDX-License-Identifier: Apache-2.0
"""Load and unload a bundle again and again, then call one runtime from many threads at once.

    python tests/fuzz/loads.py [--loads 10000] [--minutes 5] [--threads 8] [--calls 1000] [--target ort-cpu]

Prints for each target how many loads there were and the resident memory at points between the first tenth and the
end, which must not grow by more than 32 MiB; then how many answers of threads differ from the first, which must be 0.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from perceiver_export.runtimes import Runtime, load

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("ort-cpu", "openvino-cpu")
_GROWTH = 32.0  # MiB
_SHAPE = (1, 3, 28, 28)


def resident() -> float:
    """MiB of this process that are in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def load_often(bundle: Path, target: str, count: int, seconds: float) -> tuple[int, list[float]]:
    """Load, run once and close: how often, and the resident MiB after each tenth of the loads or of the time."""
    feeds = {"image": np.ones(_SHAPE, np.float32)}
    start, done = time.monotonic(), 0
    memory: list[float] = []
    while done < count and (spent := time.monotonic() - start) < seconds:
        with load(bundle, target) as runtime:
            runtime.run(feeds)
        done += 1
        if len(memory) < int(10 * max(done / count, spent / seconds)):
            memory.append(resident())
    return done, [*memory, resident()]


def differing_answers(runtime: Runtime, threads: int, calls: int) -> int:
    """Call one runtime from threads at once, each with its own inputs: how many answers differ from a lone call's."""
    made = (np.random.default_rng(number).normal(size=_SHAPE) for number in range(threads))
    inputs = [{"image": one.astype(np.float32)} for one in made]
    alone = [runtime.run(feeds)["logits"] for feeds in inputs]
    barrier = threading.Barrier(threads)

    def differing(number: int) -> int:
        barrier.wait()
        answers = (runtime.run(inputs[number])["logits"] for _ in range(calls))
        return sum(not np.array_equal(answer, alone[number]) for answer in answers)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(differing, range(threads)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop the loads of a target after so many")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--target", choices=TARGETS, action="append")
    options = parser.parse_args()
    from perceiver_export.exporter import export

    failed = False
    with tempfile.TemporaryDirectory() as directory:
        bundle = export(ROOT / "examples" / "fashion_mnist" / "checkpoint", Path(directory) / "bundle").path
        for target in options.target or TARGETS:
            with load(bundle, target) as runtime:
                wrong = differing_answers(runtime, options.threads, options.calls)
            print(f"{target}: {options.threads} threads × {options.calls:,} calls, {wrong} answers differ", flush=True)
            done, memory = load_often(bundle, target, options.loads, 60 * options.minutes)
            shown = " ".join(f"{one:.0f}" for one in memory)
            print(f"{target}: {done:,} loads and unloads, resident MiB: {shown}", flush=True)
            failed |= wrong > 0 or memory[-1] - memory[0] > _GROWTH
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
