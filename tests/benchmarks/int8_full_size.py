# SPDX-License-Identifier: Apache-2.0
"""Integer kernels, size and speed of the full-size architectures in int8, beside plain fp32 exports (random weights).

    python tests/benchmarks/int8_full_size.py [PRESET…] [--work DIR] [--samples 2] [--rounds 3] [--threads 2]
        [--bf16] [--no-plain] [--leave-out "plain ort"] [--json FILE]

One model with random weights is exported (folded, as `export` does) and quantized on random samples, and exported by
transformers → torch.onnx as it is. Printed are the share of the linears' multiply-adds in integer kernels as ONNX
Runtime and OpenVINO say, what is excluded, bytes of graph and weights over those of the fp32 bundle, the largest
resident size while quantizing, and milliseconds a call of all sides as `folds.py` takes them: fresh processes in turn.
The speed-up is over the faster engine with the plain export. With ``--bf16`` also int8 on OpenVINO with floats of 16
bits (`--precision bf16`), beside the same fp32. Video has no plain side: it is split, and as transformers has it it
takes more memory than most machines have. Weights are random: this says nothing about accuracy. A step that is already
in ``--work`` is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from perceiver_export.calibration.record import read_calibration
from perceiver_export.exporter import export
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from tests.benchmarks.folds import ENGINES, golden, in_a_process
from tests.benchmarks.plain_models import plain_export, plain_feeds, transformers_model

PRESETS = (
    "imagenet-fourier",
    "imagenet-learned",
    "imagenet-conv",
    "language-bytes",
    "optical-flow",
    "video-autoencoding",
)
QUANTIZE = """
import resource, sys
from perceiver_export.calibration import quantize
source, out, samples, threads = sys.argv[1:]
quantize(source, "random", out, samples=int(samples), min_coverage=0, threads=int(threads))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def exported(preset: str, work: Path, plain: bool) -> Bundle:
    """The folded bundle, and the plain graph of the same weights beside it, where transformers has that model."""
    path, graph = work / f"{preset}-folded", work / f"{preset}-plain" / "model.onnx"
    if (path / "manifest.json").is_file() and (graph.is_file() or not plain):
        return open_bundle(path)
    model = transformers_model(preset) if plain else None
    if model is None:
        return export(f"preset:{preset}", path, overwrite=True)
    model.save_pretrained(work / f"{preset}-checkpoint")
    bundle = export(work / f"{preset}-checkpoint", path, overwrite=True)
    plain_export(preset, model, golden(path), graph)
    return bundle


def quantized(fp32: Bundle, out: Path, samples: int, threads: int) -> tuple[Bundle, float | None]:
    """The int8 bundle, and the largest MiB of the process that made it, if it was made now."""
    if (out / "manifest.json").is_file():
        return open_bundle(out), None
    command = [sys.executable, "-c", QUANTIZE, str(fp32.path), str(out), str(samples), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return open_bundle(out), float(done.stdout.splitlines()[-1])


def graph_bytes(bundle: Bundle) -> int:
    """Bytes of the canonical graphs and of the weights."""
    files = {part.file for part in bundle.manifest.parts.values()} | {"model.weights"}
    return sum(entry.size for name, entry in bundle.manifest.files.items() if name in files)


def measure(preset: str, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one architecture."""
    plain = arguments.plain and preset != "video-autoencoding"
    fp32 = exported(preset, work, plain)
    int8, peak = quantized(fp32, work / f"{preset}-int8", arguments.samples, arguments.threads)
    calibration = read_calibration(int8)
    assert calibration is not None
    assert int8.manifest.quantization is not None
    result: dict[str, Any] = {
        "preset": preset,
        "linears": {part: len(record.linears) for part, record in calibration.parts.items()},
        "integer share": int8.manifest.quantization.integer_share,
        "bytes over fp32's": graph_bytes(int8) / graph_bytes(fp32),
        "excluded": {part: sum(one.share for one in record.excluded) for part, record in calibration.parts.items()},
        "kept float": int8.manifest.quantization.kept_float,
        "not integer": [
            f"{one.target}: {layer.name} ({layer.kernel})"
            for record in calibration.parts.values()
            for one in record.coverage
            for layer in one.in_float
        ],
        "peak MiB while quantizing": peak,
    }
    if not arguments.rounds:
        return result
    result["milliseconds"] = times = in_turn(preset, work, plain, arguments)
    best = {
        kind: min(ms for side, ms in times.items() if side.split()[0] == kind) for kind in {s.split()[0] for s in times}
    }
    result["int8 over our fp32"] = best["fp32"] / best["int8"]
    if plain:
        result["int8 over the best plain fp32"] = best["plain"] / best["int8"]
        if arguments.bf16:
            result["int8 with floats of bf16 over the best plain fp32"] = best["plain"] / best["int8-bf16"]
    return result


def in_turn(preset: str, work: Path, plain: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of a call, by side and engine."""
    feeds = golden(work / f"{preset}-folded")
    np.savez(work / "folded.npz", allow_pickle=False, **feeds)
    sides = {"fp32": ("folded", work / f"{preset}-folded"), "int8": ("folded", work / f"{preset}-int8")}
    if plain:
        np.savez(work / "plain.npz", allow_pickle=False, **plain_feeds(preset, feeds))
        sides["plain"] = ("plain", work / f"{preset}-plain" / "model.onnx")
    if arguments.bf16:
        sides["int8-bf16"] = ("bf16", work / f"{preset}-int8")
    found: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for engine in ENGINES:
            for side, (kind, source) in sides.items():
                if f"{side} {engine}" in (*arguments.leave_out, "int8-bf16 ort"):
                    continue
                feed = work / ("plain.npz" if kind == "plain" else "folded.npz")
                run = in_a_process(kind, source, engine, feed, work / "out.npy", arguments.threads)
                found.setdefault(f"{side} {engine}", []).append(run["ms"])
    return {side: float(np.median(times)) for side, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0 for none")
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bf16", action="store_true", help="also int8 beside bf16 on OpenVINO")
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="SIDE", help='of timing, as "plain ort" (slow)')
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results, work = [], arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for preset in arguments.presets:
            results.append(measure(preset, work, arguments))
            print(json.dumps(results[-1], indent=1), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
