# SPDX-License-Identifier: Apache-2.0
"""The overhead of `Runtime.run` over the raw engine call on the same feeds, and the memory that it allocates.

    python -m tests.benchmarks.overhead [--calls 2000]

The model is tiny, so that the call dominates. All sides take turns in one process, on the same compiled graph. Raw
calls return new arrays, as `Runtime.run` does: `session.run`; `request.infer(…, share_inputs=True)`.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.exporter import LoadedModel, export
from perceiver_export.exporter.model.architectures import EncoderSizes, image_classifier, image_input
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.runtimes import Runtime, devices, load
from tests.benchmarks.harness import Row, command, in_turn, medians, seconds_in_turn

_SIZE = 512  # outputs of the second model are 512 × 512 numbers, so that their allocation would show


def measure(work: Path, calls: int = 2000) -> Iterator[Row]:
    narrow = export(tiny_model(), work / "tiny")
    wide = export(tiny_model(_SIZE * _SIZE), work / "wide")
    for device in devices():
        with load(narrow, device.target, threads=1) as runtime:
            sides = {"raw": raw_call(runtime, feeds()), **own_calls(runtime)}
            in_turn(sides, 100)
            times = medians(seconds_in_turn(sides, calls))
        with load(wide, device.target, threads=1) as runtime:
            peaks = {name: allocated(call) for name, call in own_calls(runtime).items()}
        for name, median in times.items():
            over = 1e6 * (median - times["raw"])
            yield {"target": device.target, "call": name, "µs": 1e6 * median, "µs over raw": over}
        yield {"target": device.target, "bytes of the output": 4 * _SIZE**2, "bytes allocated": peaks}


def tiny_model(num_labels: int = 10) -> LoadedModel:
    """The conv architecture with 4 latents of 8 channels and one layer, on 32 × 32 images."""
    image = image_input("conv", 32, 32, "deepmind", (8, 8))
    config = image_classifier(image, EncoderSizes(4, 8, 1, num_self_attention_heads=1), num_labels, "deepmind")
    return LoadedModel(PerceiverIO(config).eval(), config, "arrays", "deepmind", "tiny")


def feeds() -> dict[str, Any]:
    return {"image": np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)}


def raw_call(runtime: Runtime, given: dict[str, Any]) -> Callable[[], Any]:
    """The engine's own call, on the runtime's compiled graph."""
    engine: Any = runtime._engine
    if hasattr(engine, "_session"):
        return lambda: engine._session.run(None, given)
    request = engine._compiled.create_infer_request()
    return lambda: request.infer(given, share_inputs=True)


def own_calls(runtime: Runtime) -> dict[str, Callable[[], Any]]:
    given = feeds()
    return {"run": partial(runtime.run, given), "run with out=": partial(runtime.run, given, out=runtime.run(given))}


def allocated(call: Callable[[], Any]) -> int:
    """Peak bytes that Python and numpy allocate during one call."""
    call()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    call()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    command(measure)
