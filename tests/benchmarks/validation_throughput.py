# SPDX-License-Identifier: Apache-2.0
"""What `validate` costs over the bare inference of both models: 10,000 pictures, bundle against bundle.

    python tests/benchmarks/validation_throughput.py [--samples 10000] [--json]

Bare is `Runtime.run` of both models on inputs that are prepared already, nothing else. Both are run in blocks of 512
samples in turn, so that what else the machine does hits both alike; what `validate` does once at its end (bounds,
worst pictures) is added in full.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from perceiver_export.calibration import validate
from perceiver_export.exporter import export
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.tasks.graphs import run_batched

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"
_BLOCK = 512


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one = export(FASHION / "checkpoint", Path(folder) / "one").path
        other = export(FASHION / "checkpoint", Path(folder) / "other").path
        found = measure(one, other, options.samples)
    if options.json:
        json.dump(found, sys.stdout, indent=2)
    else:
        print(
            f"{options.samples:,} pictures, two models: bare {found['bare']:.1f} s, validate {found['validate']:.1f} s,"
            f" ratio {found['ratio']:.3f}"
        )


def measure(one: Path, other: Path, samples: int) -> dict[str, float]:
    with np.load(FASHION / "test.npz") as data:
        images = data["image"][:samples]
    marks: list[float] = []
    bare = 0.0
    with open_task(one) as first, open_task(other) as second:
        inputs = np.stack([first.preprocess(image) for image in images])

        def run_bare(done: int, total: int | None) -> None:
            """After each block of `validate`, the same block bare; its time is taken out of `validate`'s."""
            nonlocal bare
            if done % _BLOCK and done != total:
                return
            start = time.perf_counter()
            begin = len(marks) * _BLOCK
            for runtime in (first.runtime, second.runtime):
                run_batched(runtime, {"image": inputs[begin : min(begin + _BLOCK, done)]})
            bare += time.perf_counter() - start
            marks.append(bare)

        start = time.perf_counter()
        validate(one, FASHION / "test.npz", against=other, samples=samples, max_drop=0.5, progress=run_bare)
        whole = time.perf_counter() - start - bare
    return {"bare": bare, "validate": whole, "ratio": whole / bare}


if __name__ == "__main__":
    main()
