# SPDX-License-Identifier: Apache-2.0
"""Loading a built engine against the raw engine's own load; and how fast an engine for something else is told.

    python tests/benchmarks/loading.py [--source preset:imagenet-fourier] [--processes 7] [--json]

Each load is in a process of its own that has imported the library before; sides in turn. The raw side opens the very
engine files with the same settings: `InferenceSession` of the optimized graph, `import_model` of the blob.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.exporter import export
from perceiver_export.runtimes import Bundle, build, devices
from perceiver_export.runtimes.engines.backend import EngineOptions
from perceiver_export.runtimes.engines.records import make_source
from perceiver_export.runtimes.engines.targets import find_target
from perceiver_export.runtimes.loading import find_engine

OURS = """
import sys, time
from perceiver_export.runtimes import load
from perceiver_export.runtimes.engines.targets import find_target
from perceiver_export.runtimes.engines.backend import EngineOptions
bundle, target = sys.argv[1:3]
find_target(target).backend().platform(target, EngineOptions())
start = time.perf_counter()
runtime = load(bundle, target)
print(time.perf_counter() - start)
"""
RAW = {
    "onnxruntime": """
import sys, time
import onnxruntime
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
start = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[3] + "/model.onnx", options, providers=["CPUExecutionProvider"])
print(time.perf_counter() - start)
""",
    "openvino": """
import sys, time
import openvino
core = openvino.Core()
core.get_property("CPU", "FULL_DEVICE_NAME")
start = time.perf_counter()
blob = open(sys.argv[3] + "/model.blob", "rb").read()
model = core.import_model(blob, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"})
print(time.perf_counter() - start)
""",
}


def milliseconds(code: str, *arguments: str) -> float:
    """What a fresh process measured."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout) * 1e3


def loads(bundle: Bundle, target: str, processes: int) -> dict[str, float]:
    """Median milliseconds of both sides, and the median of their paired ratio."""
    (built,) = build(bundle, target)
    library = find_target(target).distributions[0]
    ours, raw = [], []
    for index in range(processes + 1):
        pair = [milliseconds(code, str(bundle.path), target, str(built.directory)) for code in (OURS, RAW[library])]
        if index:  # the first hashes the files, once
            ours.append(pair[0])
            raw.append(pair[1])
    ratios = np.array(ours) / np.array(raw)
    return {"ours": float(np.median(ours)), "raw": float(np.median(raw)), "ratio": float(np.median(ratios))}


def preflight(bundle: Bundle, target: str) -> float:
    """Milliseconds to say that an engine was built for another device, median of 50."""
    (built,) = build(bundle, target)
    record = json.loads((built.directory / "engine.json").read_bytes())
    record["identity"]["platform"]["device"] = "another device"
    (built.directory / "engine.json").write_text(json.dumps(record))
    (name, part), backend = next(iter(bundle.manifest.parts.items())), find_target(target).backend()
    times = []
    for _ in range(50):
        start = time.perf_counter()
        found, stale = find_engine(bundle, name, make_source(bundle, part, target, EngineOptions()), backend, None)
        times.append((time.perf_counter() - start) * 1e3)
        assert found is None
        assert "another device" in stale[0].problems[0]
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="preset:imagenet-fourier")
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        bundle = export(arguments.source, Path(directory) / "bundle")
        for device in devices():
            results[device.target] = loads(bundle, device.target, arguments.processes)
            results[device.target]["preflight"] = preflight(bundle, device.target)
    if arguments.json:
        print(json.dumps(results))
        return
    for target, result in results.items():
        print(
            f"{target:13s} load of a built engine {result['ours']:.1f} ms, the raw engine's {result['raw']:.1f} ms, "
            f"ratio {result['ratio']:.3f}; an engine for another device is told in {result['preflight']:.2f} ms"
        )


if __name__ == "__main__":
    main()
