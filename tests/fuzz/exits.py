# SPDX-License-Identifier: Apache-2.0
"""Programs that end in the middle of something: each must leave with exit code 0 and say nothing.

    python tests/fuzz/exits.py [--times 4] [--bundle FASHION] [--json]

Each case runs in a process of its own on every target, ``times`` times. Prints the exits, and those that failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

TARGETS = ("ort-cpu", "openvino-cpu")
_START = """
import sys, threading, time
import numpy as np
from perceiver_export.runtimes import Batcher, load

bundle, target = sys.argv[1:]
feeds = {"image": np.ones((1, 3, 28, 28), np.float32)}

def in_daemons(call):
    def forever():
        while True:
            call()
    for _ in range(2):
        threading.Thread(target=forever, daemon=True).start()
    time.sleep(0.05)

def again(submit):
    submit(feeds).add_done_callback(lambda done: again(submit))

runtime = load(bundle, target)
runtime.run(feeds)
"""
CASES = {
    "requests in flight": "kept = [runtime.submit(feeds) for _ in range(50)]",
    "requests of a runtime that was dropped": "kept = [load(bundle, target).submit(feeds) for _ in range(2)]",
    "requests of one thread": "one = load(bundle, target, threads=1); kept = [one.submit(feeds) for _ in range(9)]",
    "a daemon in run": "in_daemons(lambda: runtime.run(feeds))",
    "a daemon in submit": "in_daemons(lambda: runtime.submit(feeds).result())",
    "a daemon in stream": "in_daemons(lambda: list(runtime.stream([feeds] * 4)))",
    "a daemon in load": "in_daemons(lambda: load(bundle, target).run(feeds))",
    "a daemon in devices": "",
    "a daemon in a batcher": "batcher = Batcher(runtime); in_daemons(lambda: batcher.run(feeds))",
    "a batcher's requests": "batcher = Batcher(runtime); kept = [batcher.submit(feeds) for _ in range(4)]",
    "callbacks that submit": "again(runtime.submit)",
    "callbacks that submit to one thread": "one = load(bundle, target, threads=1); again(one.submit)",
    "callbacks that submit to a batcher": "batcher = Batcher(runtime); again(batcher.submit)",
    "a callback that closes": "runtime.submit(feeds).add_done_callback(lambda done: runtime.close())",
    "a hook that runs last": "",
}
# What was registered before this package's hook runs after it; a program may end before it has loaded anything.
_EARLY = {
    "a hook that runs last": "import atexit\natexit.register(lambda: runtime.submit(feeds).result())\n",
    "a daemon in devices": """
import sys, threading, time
from perceiver_export.runtimes import devices
def forever():
    while devices():
        pass
for _ in range(2):
    threading.Thread(target=forever, daemon=True).start()
devices()
time.sleep(0.1)
sys.exit()
""",
}


def exits(bundle: Path, times: int) -> Iterator[tuple[str, str]]:
    """For each exit the case with its target, and what was wrong; empty where nothing was."""
    for target in TARGETS:
        for name in CASES:
            for _ in range(times):
                yield f"{name}, {target}", problem(name, bundle, target)


def problem(name: str, bundle: Path, target: str) -> str:
    """What is wrong with one exit of that case; empty where nothing is."""
    program = _EARLY.get(name, "") + _START + CASES[name]
    command = [sys.executable, "-c", program, str(bundle), target]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "it did not end in 60 s"
    said = done.stdout + done.stderr
    return f"exit code {done.returncode}: {said[-500:]}" if done.returncode or said else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bundle = arguments.bundle or _fashion(Path(directory) / "fashion")
        found = list(exits(bundle, arguments.times))
    failed = [f"{name}: {problem}" for name, problem in found if problem]
    if arguments.json:
        print(json.dumps({"exits": len(found), "failed": failed}))
    else:
        print("\n".join([*failed, f"{len(found)} exits, {len(failed)} failed"]))
    sys.exit(1 if failed else 0)


def _fashion(path: Path) -> Path:
    from perceiver_export.exporter import export

    return export(Path(__file__).parents[2] / "examples" / "fashion_mnist" / "checkpoint", path).path


if __name__ == "__main__":
    main()
