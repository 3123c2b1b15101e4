# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a calibration pass relative to plain inference, by number of samples.

    python -m tests.benchmarks.calibration_memory [--bundle BUNDLE] [--samples 32 128 512]

Each side runs in a fresh process. Plain inference loads the same libraries and runs samples on ONNX Runtime.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.benchmarks.harness import FASHION, Row, command, fresh


def measure(work: Path, bundle: Path | None = None, samples: tuple[int, ...] = (32, 128, 512)) -> Iterator[Row]:
    if bundle is None:
        from perceiver_export.exporter import export

        bundle = export(FASHION / "checkpoint", work / "fashion").path
    plain = fresh(run_plain, bundle, min(samples))
    yield {"pass": "plain inference", "samples": min(samples), "MiB": plain, "over plain": 1.0}
    for count in samples:
        found = fresh(calibrate, bundle, count)
        yield {"pass": "calibration", "samples": count, "MiB": found, "over plain": found / plain}


def run_plain(path: str, count: int) -> float:
    """The peak MiB of plain inference."""
    from perceiver_export.calibration.data.calls import run_parts
    from perceiver_export.calibration.data.samples import Samples, stack
    from perceiver_export.runtimes import open_bundle
    from perceiver_export.runtimes.machine import peak_memory
    from perceiver_export.runtimes.opening import open_engine

    bundle, generator = open_bundle(path), np.random.default_rng(0)
    parts = bundle.manifest.parts
    runners = {name: open_engine(bundle.file(part.file), "ort-cpu", None).run for name, part in parts.items()}
    for sample in itertools.islice(Samples("random", bundle.manifest).stream, count):
        run_parts(bundle.manifest, runners, stack([sample]), generator)
    return peak_memory()


def calibrate(path: str, count: int) -> float:
    """The peak MiB of a calibration pass."""
    from perceiver_export.calibration.data.samples import Samples
    from perceiver_export.calibration.quantization.options import QuantizeOptions
    from perceiver_export.calibration.quantization.statistics import observe
    from perceiver_export.runtimes import open_bundle
    from perceiver_export.runtimes.machine import peak_memory

    bundle = open_bundle(path)
    samples = (one.feeds for one in Samples("random", bundle.manifest).stream)
    observe(bundle, samples, QuantizeOptions(samples=count), lambda *_: None)
    return peak_memory()


if __name__ == "__main__":
    command(measure)
