# SPDX-License-Identifier: Apache-2.0
"""The overhead of `validate` over the bare inference of both models: 10,000 images, bundle against bundle.

    python -m tests.benchmarks.validation_throughput [--samples 10000]

Bare inference is `Runtime.run` of both models on inputs that are already prepared. The two take turns, in blocks of at
least 512 samples, so that other load on the machine affects both alike, and the median block stands for all. The work
that `validate` does once, before (load) and after (bounds, worst images), is added in full.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from perceiver_export.calibration import validate
from perceiver_export.exporter import export
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.tasks.base import run_batched
from tests.benchmarks.harness import FASHION, Row, command, seconds
from tests.calibration.asked import asked

_BLOCK = 512


def measure(work: Path, samples: int = 10_000) -> Iterator[Row]:
    """Seconds of all samples through both models."""
    one, other = (export(FASHION / "checkpoint", work / name).path for name in ("one", "other"))
    with np.load(FASHION / "test.npz") as data:
        images = data["image"][:samples]
    with open_task(one) as first, open_task(other) as second:
        inputs = np.stack([first.preprocess(image) for image in images])
        bare: list[float] = []  # seconds per sample, by block
        ours: list[float] = []
        begin, resumed = 0, time.perf_counter()

        def run_bare(done: int, total: int | None) -> None:
            """After each block of `validate`, the same samples bare."""
            nonlocal begin, resumed
            if done - begin < _BLOCK and done != total:
                return
            ours.append((time.perf_counter() - resumed) / (done - begin))
            block = {"image": inputs[begin:done]}
            took = sum(seconds(partial(run_batched, task.runtime, block)) for task in (first, second))
            bare.append(took / (done - begin))
            begin, resumed = done, time.perf_counter()

        validate(one, FASHION / "test.npz", asked(against=other, samples=samples, max_drop=0.5), progress=run_bare)
        after = time.perf_counter() - resumed
    once = after + max(0.0, ours[0] - float(np.median(ours))) * min(_BLOCK, samples)
    expected, whole = samples * float(np.median(bare)), samples * float(np.median(ours)) + once
    yield {"samples": samples, "bare": expected, "validate": whole, "of it once": once, "ratio": whole / expected}


if __name__ == "__main__":
    command(measure)
