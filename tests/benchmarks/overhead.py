# SPDX-License-Identifier: Apache-2.0
"""What `Runtime.run` costs over the raw engine call on the same feeds.

    python tests/benchmarks/overhead.py [--calls 2000]

The model is tiny, so that the call dominates. Both sides run in turn in one process, on the same session.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.exporter import LoadedModel, export
from perceiver_export.exporter.perceiver.architectures import EncoderSizes, image_classifier, image_input
from perceiver_export.runtimes import load
from perceiver_export.runtimes.engines.ort import OrtEngine


def tiny_model() -> LoadedModel:
    """The conv architecture with 4 latents of 8 channels and one layer, on 32 × 32 pictures."""
    from perceiver_export.exporter.perceiver.model import PerceiverIO

    image = image_input("conv", 32, 32, "deepmind", (8, 8))
    config = image_classifier(image, EncoderSizes(4, 8, 1, num_self_attention_heads=1), 10, "deepmind")
    return LoadedModel(PerceiverIO(config).eval(), config, "arrays", "deepmind", "tiny")


def microseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    calls = parser.parse_args().calls
    with tempfile.TemporaryDirectory() as directory:
        bundle = export(tiny_model(), Path(directory) / "tiny")
        with load(bundle, threads=1) as runtime:
            engine = runtime._engine
            assert isinstance(engine, OrtEngine)
            session = engine._session
            feeds = {"image": np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)}
            out = {"logits": np.empty((1, 10), np.float32)}
            sides: dict[str, Callable[[], Any]] = {
                "raw session.run": lambda: session.run(None, feeds),
                "Runtime.run": lambda: runtime.run(feeds),
                "Runtime.run with out=": lambda: runtime.run(feeds, out=out),
            }
            for call in sides.values():
                for _ in range(100):
                    call()
            times: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(calls):
                for name, call in sides.items():
                    times[name].append(microseconds(call))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:24s} median {median:8.1f} µs   over raw {median - medians['raw session.run']:+7.1f} µs")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
