# SPDX-License-Identifier: Apache-2.0
"""Time to load a built engine, against the engine library's own load; time to detect an engine for another device.

    python -m tests.benchmarks.loading [--source preset:imagenet-fourier] [--processes 7]

Each load runs in a fresh process that has already imported the library; sides take turns. The raw side opens the same
engine files with the same settings: `InferenceSession` of the optimized graph, `import_model` of the blob.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tests.benchmarks.harness import Row, command, fresh, in_turn, medians, seconds

if TYPE_CHECKING:
    from perceiver_export.runtimes import Bundle


def measure(work: Path, source: str = "preset:imagenet-fourier", processes: int = 7) -> Iterator[Row]:
    from perceiver_export.exporter import export
    from perceiver_export.runtimes import build, devices
    from perceiver_export.runtimes.engines.backend import find_target

    bundle = export(source, work / "bundle")
    for device in devices():
        target = device.target
        (built,) = build(bundle, target)
        raw = {"onnxruntime": load_onnxruntime, "openvino": load_openvino}[find_target(target).distributions[0]]
        sides = {"ours": partial(fresh, load_ours, bundle.path, target), "raw": partial(fresh, raw, built.directory)}
        fresh(load_ours, bundle.path, target)  # hashes the files, once
        found = in_turn(sides, processes)
        ratio = float(np.median(np.array(found["ours"]) / found["raw"]))
        stale = preflight(bundle, target, built.directory)
        yield {
            "target": target,
            "ms": medians(found),
            "ratio": ratio,
            "ms to find that it is for another device": stale,
        }


def load_ours(bundle: str, target: str) -> float:
    """Milliseconds."""
    from perceiver_export.runtimes import load
    from perceiver_export.runtimes.engines.backend import EngineOptions, find_target

    find_target(target).backend().platform(target, EngineOptions())
    return 1e3 * seconds(lambda: load(bundle, target))


def load_onnxruntime(engine: str) -> float:
    """Milliseconds."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return 1e3 * seconds(lambda: ort.InferenceSession(f"{engine}/model.onnx", options, ["CPUExecutionProvider"]))


def load_openvino(engine: str) -> float:
    """Milliseconds."""
    import openvino

    core, settings = openvino.Core(), {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    core.get_property("CPU", "FULL_DEVICE_NAME")
    return 1e3 * seconds(lambda: core.import_model(Path(engine, "model.blob").read_bytes(), "CPU", settings))


def preflight(bundle: Bundle, target: str, engine: Path) -> float:
    """Milliseconds to detect that an engine was built for another device, median of 50."""
    from perceiver_export.runtimes.engines.backend import EngineOptions
    from perceiver_export.runtimes.opening import engine_for

    record = json.loads((engine / "engine.json").read_bytes())
    record["identity"]["platform"]["device"] = "another device"
    (engine / "engine.json").write_text(json.dumps(record))
    name = next(iter(bundle.manifest.parts))

    def find() -> None:
        _, found, stale = engine_for(bundle, name, target, EngineOptions(), None)
        assert found is None
        assert "another device" in stale[0].problems[-1]

    return float(np.median([1e3 * seconds(find) for _ in range(50)]))


if __name__ == "__main__":
    command(measure)
