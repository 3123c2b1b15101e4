# SPDX-License-Identifier: Apache-2.0
"""What `Runtime.run` costs over the raw engine call on the same feeds, and what it allocates.

    python tests/benchmarks/overhead.py [--calls 2000] [--json]

The model is tiny, so that the call dominates. All sides run in turn in one process, on the same compiled graph. Raw
calls give arrays of the caller's own, as `Runtime.run` does: `session.run`; `request.infer(…, share_inputs=True)`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.exporter import LoadedModel, export
from perceiver_export.exporter.perceiver.architectures import EncoderSizes, image_classifier, image_input
from perceiver_export.runtimes import Runtime, devices, load

_SIZE = 512  # outputs of the second model, 512 × 512 numbers: an allocation of them would be seen


def tiny_model(num_labels: int = 10) -> LoadedModel:
    """The conv architecture with 4 latents of 8 channels and one layer, on 32 × 32 pictures."""
    from perceiver_export.exporter.perceiver.model import PerceiverIO

    image = image_input("conv", 32, 32, "deepmind", (8, 8))
    config = image_classifier(image, EncoderSizes(4, 8, 1, num_self_attention_heads=1), num_labels, "deepmind")
    return LoadedModel(PerceiverIO(config).eval(), config, "arrays", "deepmind", "tiny")


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def raw_call(runtime: Runtime, feeds: dict[str, Any]) -> Callable[[], Any]:
    """The engine's own call, on what the runtime holds."""
    engine: Any = runtime._engine
    if hasattr(engine, "_session"):
        return lambda: engine._session.run(None, feeds)
    request = engine._compiled.create_infer_request()
    return lambda: request.infer(feeds, share_inputs=True)


def overhead(runtime: Runtime, calls: int) -> dict[str, float]:
    """Medians in microseconds of the raw call, `run` and `run(out=)`, in turn."""
    feeds = {"image": np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)}
    out = runtime.run(feeds)
    sides: dict[str, Callable[[], Any]] = {
        "raw": raw_call(runtime, feeds),
        "run": lambda: runtime.run(feeds),
        "run with out=": lambda: runtime.run(feeds, out=out),
    }
    for call in sides.values():
        for _ in range(100):
            call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(calls):
        for name, call in sides.items():
            times[name].append(microseconds(call))
    return {name: float(np.median(values)) for name, values in times.items()}


def allocated(runtime: Runtime) -> dict[str, int]:
    """Peak bytes that Python and numpy allocate during one call, with and without ``out``."""
    feeds = {"image": np.zeros((1, 3, 32, 32), np.float32)}
    out = runtime.run(feeds)
    sides: dict[str, Callable[[], Any]] = {
        "run": lambda: runtime.run(feeds),
        "out=": lambda: runtime.run(feeds, out=out),
    }
    peaks = {}
    for name, call in sides.items():
        call()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        call()
        peaks[name] = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        bundle = export(tiny_model(), Path(directory) / "tiny")
        wide = export(tiny_model(_SIZE * _SIZE), Path(directory) / "wide")
        for device in devices():
            with load(bundle, device.target, threads=1) as runtime:
                medians = overhead(runtime, arguments.calls)
            with load(wide, device.target, threads=1) as runtime:
                results[device.target] = {"microseconds": medians, "bytes": allocated(runtime)}
    if arguments.json:
        print(json.dumps(results))
        return
    for target, result in results.items():
        medians, peaks = result["microseconds"], result["bytes"]
        for name, median in medians.items():
            print(f"{target:13s} {name:14s} median {median:8.1f} µs   over raw {median - medians['raw']:+7.1f} µs")
        size = 4 * _SIZE * _SIZE
        print(f"{target:13s} outputs of {size:,} bytes: run allocates {peaks['run']:,}, out= {peaks['out=']:,}")


if __name__ == "__main__":
    main()
