# SPDX-License-Identifier: Apache-2.0
"""The runtime and the folds of this checkout against those of an older commit, in one run

    python -m tests.benchmarks.commits [--before COMMIT] [--preset imagenet-learned] [--rounds 7] [--page]

Both commits export and quantize the trained Fashion-MNIST model and export a preset with random weights, through their
own command lines. Then fresh processes of both take turns and use public names only: each loads a bundle whose engine
is built, calls it, and streams with two calls in flight. The ratios are after over before, round by round, for the time
to load, the median call, and 40 streamed calls (small models only), each with its quartiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from tests.benchmarks.harness import FASHION, REPOSITORY, Row, command, in_turn
from tests.benchmarks.sides import ENGINES

_MEASURE = """
import importlib, json, sys, time
from itertools import repeat
from statistics import median
import numpy as np
from perceiver_export.runtimes import load, open_bundle
bundle, target, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
importlib.import_module({"ort-cpu": "onnxruntime", "openvino-cpu": "openvino"}[target])
(part,) = open_bundle(bundle).manifest.parts.values()
random = np.random.default_rng(0)
feeds = {one.name: random.normal(size=one.shape).astype(one.dtype) for one in part.inputs}
opened = []
found = {"load": seconds(lambda: opened.append(load(bundle, target, threads=2)))}
run = lambda: opened[0].run(feeds)
run()
found["call"] = median(seconds(run) for _ in range(calls))
if calls >= 100:
    found["stream"] = min(seconds(lambda: [0 for _ in opened[0].stream(repeat(feeds, 40))]) for _ in range(5))
print(json.dumps(found))
"""


def measure(work: Path, before: str = "4276844^", preset: str = "imagenet-learned", rounds: int = 7) -> Iterator[Row]:
    """A row per bundle and engine."""
    old = work / "checkout"
    subprocess.run(["git", "worktree", "add", "--force", "--detach", old, before], cwd=REPOSITORY, check=True)
    try:
        sides = {"before": package(old, work / "before"), "after": package(REPOSITORY, work / "after")}
        for side in sides.values():
            make_bundles(side, preset)
        for name in ("fashion", "fashion-int8", "preset"):
            for engine in ENGINES:
                yield {"bundle": name, "engine": engine} | compare(sides, name, engine, rounds)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", old], cwd=REPOSITORY, check=True)


def package(checkout: Path, folder: Path) -> Path:
    """A folder whose `perceiver_export` is the checkout's."""
    root = folder / "perceiver_export"
    root.mkdir(parents=True)
    for name in ("exporter", "runtimes", "calibration"):
        (root / name).symlink_to(checkout / name)
    return folder


def python(side: Path, *arguments: str | Path) -> str:
    """The output of Python with this side's package."""
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": str(side)}, cwd=side, text=True,
        check=True, stdout=subprocess.PIPE,
    ).stdout  # fmt: skip


def make_bundles(side: Path, preset: str) -> None:
    """The three bundles, with the engines of both targets built."""
    run = partial(python, side, "-c", "from perceiver_export.exporter.cli.main import main; main()")
    run("export", FASHION / "checkpoint", "-o", "fashion")
    run("quantize", "fashion", "--data", FASHION / "held_out.npz", "-o", "fashion-int8")
    run("export", f"preset:{preset}", "-o", "preset")
    for name in ("fashion", "fashion-int8", "preset"):
        for engine in ENGINES:
            run("build", name, "--target", f"{engine}-cpu")


def compare(sides: dict[str, Path], name: str, engine: str, rounds: int) -> Row:
    """The median and quartiles of after over before."""
    calls = {
        side: partial(python, path, "-c", _MEASURE, name, f"{engine}-cpu", "5" if name == "preset" else "500")
        for side, path in sides.items()
    }
    in_turn(calls, 1)
    found = {side: [json.loads(one) for one in answers] for side, answers in in_turn(calls, rounds).items()}
    row: Row = {}
    for figure in found["after"][0]:
        both = {side: np.array([one[figure] for one in answers]) for side, answers in found.items()}
        low, middle, high = (float(one) for one in np.quantile(both["after"] / both["before"], [0.25, 0.5, 0.75]))
        row[figure] = {"ms before": 1e3 * float(np.median(both["before"])), "ratio": middle, "quartiles": [low, high]}
    return row


if __name__ == "__main__":
    command(measure)
