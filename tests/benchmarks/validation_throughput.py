# SPDX-License-Identifier: Apache-2.0
"""What `validate` costs over the bare inference of both models: 10,000 pictures, bundle against bundle.

    python tests/benchmarks/validation_throughput.py [--samples 10000] [--json]

Bare is `Runtime.run` of both models on inputs that are prepared already, nothing else. Both are run in turn, in
blocks of at least 512 samples, so that what else the machine does hits both alike, and the median block counts for all,
so that a pause does not. What `validate` does once, before (load) and after (bounds, worst pictures), is added in full.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            f" of it once {found['once']:.1f} s, ratio {found['ratio']:.3f}"
        )


def measure(one: Path, other: Path, samples: int) -> dict[str, float]:
    with np.load(FASHION / "test.npz") as data:
        images = data["image"][:samples]
    with open_task(one) as first, open_task(other) as second:
        inputs = np.stack([first.preprocess(image) for image in images])
        bare: list[float] = []  # seconds a sample, by block
        ours: list[float] = []
        begin, resumed = 0, time.perf_counter()

        def run_bare(done: int, total: int | None) -> None:
            """After each block of `validate`, the same samples bare."""
            nonlocal begin, resumed
            if done - begin < _BLOCK and done != total:
                return
            start = time.perf_counter()
            for runtime in (first.runtime, second.runtime):
                run_batched(runtime, {"image": inputs[begin:done]})
            end = time.perf_counter()
            ours.append((start - resumed) / (done - begin))
            bare.append((end - start) / (done - begin))
            begin, resumed = done, time.perf_counter()

        validate(one, FASHION / "test.npz", against=other, samples=samples, max_drop=0.5, progress=run_bare)
        after = time.perf_counter() - resumed
    before = max(0.0, ours[0] - float(np.median(ours))) * min(_BLOCK, samples)
    whole = before + samples * float(np.median(ours)) + after
    expected = samples * float(np.median(bare))
    return {"bare": expected, "validate": whole, "once": before + after, "ratio": whole / expected}


if __name__ == "__main__":
    main()
