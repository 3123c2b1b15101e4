# SPDX-License-Identifier: Apache-2.0
"""Load time and memory of one side of a benchmark, measured in a process that has done nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from perceiver_export.runtimes.bench_sides import Side, open_side, side_feeds
from perceiver_export.runtimes.engines.backend import EngineOptions
from perceiver_export.runtimes.engines.targets import find_target
from perceiver_export.runtimes.errors import BundleError

_WARMUP = 3


class Fresh(msgspec.Struct, frozen=True):
    """Load in milliseconds; memory in MiB: the process's largest resident size, and that before the load."""

    load: float
    peak: float
    base: float


def measure_fresh(side: Side) -> Fresh:
    """Start a process, import the target's library, load, run a few times. Raises BundleError where it dies."""
    # Not `-m`, which would let a file of the current directory stand in for a library.
    code = f"import sys; sys.path.pop(0); from {__name__} import _main; _main(sys.argv[1])"
    command = [sys.executable, "-c", code, msgspec.json.encode(side).decode()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=Fresh)
    except (IndexError, msgspec.DecodeError) as error:
        raise BundleError(
            f"{side.path} cannot be run in a process of its own", done.stderr.strip()[-500:] or "it died"
        ) from error


def _main(text: str) -> None:
    side = msgspec.json.decode(text, type=Side)
    # The library's own time and size are not the model's.
    find_target(side.device).backend().platform(side.device, EngineOptions())
    base = peak_memory()
    start = time.perf_counter()
    runtime = open_side(side)
    seconds = time.perf_counter() - start
    feeds = side_feeds(side, runtime)
    for _ in range(_WARMUP):
        runtime.run(feeds)
    sys.stdout.write(json.dumps({"load": seconds * 1e3, "peak": peak_memory(), "base": base}))


def peak_memory() -> float:
    """MiB. From /proc where there is one: getrusage's figure survives exec, so it would start with the parent's."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
