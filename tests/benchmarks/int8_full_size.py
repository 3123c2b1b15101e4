# SPDX-License-Identifier: Apache-2.0
"""Integer kernels, size and speed of the full-size architectures in int8, beside plain fp32 exports (random weights).

    python tests/benchmarks/int8_full_size.py [PRESET…] [--work DIR] [--plain] [--threads 2] [--json FILE]

Exports each preset, quantizes it on two random samples, and prints the share of the linears' multiply-adds in integer
kernels as ONNX Runtime and OpenVINO say, bytes of graph and weights over those of the fp32 bundle, and milliseconds a
call, all sides in turn in one process. ``--plain`` adds what transformers → torch.onnx gives, in fp32 on both engines:
the speed-up is over the faster of them. Weights are random: this says nothing about accuracy. A step that is already
in ``--work`` is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from perceiver_export.calibration import quantize
from perceiver_export.calibration.effects import RUNNERS, Runner
from perceiver_export.calibration.record import read_calibration
from perceiver_export.exporter import export
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from tests.benchmarks.plain_models import plain_export, plain_feeds, transformers_model

PRESETS = (
    "imagenet-fourier",
    "imagenet-learned",
    "imagenet-conv",
    "language-bytes",
    "optical-flow",
    "video-autoencoding",
)
ROUNDS = 5


def made(path: Path, make: Any) -> Bundle:
    """The bundle at a path, made if it is not there."""
    return open_bundle(path) if (path / "manifest.json").is_file() else make()


def graph_bytes(bundle: Bundle) -> int:
    """Bytes of the canonical graphs and of the weights."""
    files = {part.file for part in bundle.manifest.parts.values()} | {"model.weights"}
    return sum(entry.size for name, entry in bundle.manifest.files.items() if name in files)


def measure(preset: str, work: Path, plain: bool, threads: int) -> dict[str, Any]:
    """All figures of one architecture."""
    fp32 = made(work / preset, lambda: export(f"preset:{preset}", work / preset))
    int8 = made(
        work / f"{preset}-int8",
        lambda: quantize(fp32, "random", work / f"{preset}-int8", samples=2, min_coverage=0, threads=threads),
    )
    calibration = read_calibration(int8)
    assert calibration is not None
    assert int8.manifest.quantization is not None
    result: dict[str, Any] = {
        "preset": preset,
        "integer share": int8.manifest.quantization.integer_share,
        "bytes over fp32's": graph_bytes(int8) / graph_bytes(fp32),
        "excluded": {part: sum(one.share for one in record.excluded) for part, record in calibration.parts.items()},
        "not integer": [
            f"{one.target}: {layer.name} ({layer.kernel})"
            for record in calibration.parts.values()
            for one in record.coverage
            for layer in one.in_float
        ],
    }
    result["milliseconds"] = times = in_turn(fp32, int8, preset, work, plain, threads)
    best_plain = min((ms for name, ms in times.items() if name.startswith("plain")), default=None)
    best_fp32 = min(ms for name, ms in times.items() if name.startswith("fp32"))
    best_int8 = min(ms for name, ms in times.items() if name.startswith("int8"))
    result["int8 over our fp32"] = best_fp32 / best_int8
    if best_plain is not None:
        result["int8 over the best plain fp32"] = best_plain / best_int8
    return result


def in_turn(fp32: Bundle, int8: Bundle, preset: str, work: Path, plain: bool, threads: int) -> dict[str, float]:
    """Median milliseconds of a call of all parts, by side and engine."""
    feeds = random_feeds(fp32)
    sides: dict[str, list[tuple[Runner, dict[str, np.ndarray]]]] = {}
    for kind, bundle in (("fp32", fp32), ("int8", int8)):
        for target, open_runner in RUNNERS.items():
            sides[f"{kind} {target}"] = [
                (open_runner(bundle.file(part.graph_for(target)), threads), feeds[name])
                for name, part in bundle.manifest.parts.items()
            ]
    model = transformers_model(preset) if plain else None
    if model is not None:
        path, given = work / f"{preset}-plain" / "model.onnx", feeds["model"]
        if not path.is_file():
            plain_export(preset, model, given, path)
        for target, open_runner in RUNNERS.items():
            sides[f"plain {target}"] = [(open_runner(path, threads), plain_feeds(preset, given))]
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, runs in sides.items():
            start = time.perf_counter()
            for runner, arrays in runs:
                runner(arrays)
            if number:
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: float(np.median(values)) for name, values in taken.items()}


def random_feeds(bundle: Bundle) -> dict[str, dict[str, np.ndarray]]:
    """Normal numbers; tokens and indices in range."""
    generator = np.random.default_rng(0)
    feeds: dict[str, dict[str, np.ndarray]] = {}
    for name, part in bundle.manifest.parts.items():
        feeds[name] = {}
        for spec in part.inputs:
            shape = tuple(dim if isinstance(dim, int) else spec.ranges[dim][0] for dim in spec.shape)
            whole = np.ones(shape) if spec.name.endswith("_mask") else generator.integers(6, 200, shape)
            array = generator.normal(size=shape) if spec.dtype == "float32" else whole
            feeds[name][spec.name] = array.astype(spec.dtype)
    return feeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = []
        for preset in arguments.presets:
            results.append(measure(preset, arguments.work or Path(temporary), arguments.plain, arguments.threads))
            print(json.dumps(results[-1], indent=1), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
