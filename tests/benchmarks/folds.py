# SPDX-License-Identifier: Apache-2.0
"""Time and memory of folded exports beside plain ones, transformers → torch.onnx, on ONNX Runtime and OpenVINO.

    python tests/benchmarks/folds.py [PRESET…] [--work DIR] [--rounds 3] [--threads 2] [--json FILE]

One model with random weights, saved by transformers, is exported twice: by `perceiver-export export`, and by
torch.onnx as it is. Every figure is of fresh processes that load, run twice and are timed on the runs after; sides take
turns, the median counts. The plain side is loaded as the engines' documentation has it, the folded one by our
runtime. Memory is the largest resident size of the process, libraries and weights included; what the plan predicts is
its activations, the weights, and what a process has before it loads. Outputs of all sides must agree within 1e-4 of
their scale. The engine's rate is that of one large product through it; the share of it is what the folded graph's
counted FLOPs reach.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PRESETS = ("optical-flow", "imagenet-fourier", "imagenet-learned", "imagenet-conv", "language-bytes")
ENGINES = ("ort", "openvino")
AGREE = 1e-4
_SIZE = 2048  # of the square product that measures an engine's rate


def run_side(kind: str, source: Path, engine: str, feeds: Path, output: Path, threads: int) -> dict[str, float]:
    """In this process: milliseconds of a call, the best of three after two others; the process's largest MiB."""
    from perceiver_export.runtimes import Runtime  # noqa: F401  what it imports was there before
    from perceiver_export.runtimes.fresh_process import peak_memory

    __import__({"ort": "onnxruntime", "openvino": "openvino"}[engine])
    before = peak_memory()
    run = load_plain(source, engine, threads) if kind == "plain" else load_folded(source, engine, threads, kind)
    with np.load(feeds) as arrays:
        given = dict(arrays)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        values = run(given)
        times.append((time.perf_counter() - start) * 1e3)
    np.save(output, values)
    return {"ms": min(times[2:]), "peak": peak_memory(), "before": before}


def load_folded(bundle: Path, engine: str, threads: int, kind: str) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """As the runtime loads it; of kind `bf16` what is not int8 computes in bf16."""
    from perceiver_export.runtimes import load

    runtime = load(bundle, f"{engine}-cpu", threads=threads, precision="bf16" if kind == "bf16" else None)
    return lambda feeds: next(iter(runtime.run(feeds).values()))


def load_plain(graph: Path, engine: str, threads: int) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """As the engine's own documentation has it."""
    if engine == "ort":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        return lambda feeds: np.asarray(session.run(None, feeds)[0])
    import openvino

    model = openvino.Core().compile_model(
        str(graph), "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda feeds: np.asarray(model(feeds)[0])


def gemm_rate(engine: str, threads: int) -> float:
    """GFLOP/s of one product of square matrices."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from perceiver_export.runtimes.loading import load_onnx

    matrix = np.random.default_rng(0).normal(size=(_SIZE, _SIZE)).astype(np.float32)
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [_SIZE, _SIZE]) for name in ("a", "y")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["y"])],
        "product",
        tensors[:1],
        tensors[1:],
        [numpy_helper.from_array(matrix, "b")],
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        runtime = load_onnx(path, f"{engine}-cpu", threads)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            runtime.run({"a": matrix})
            times.append(time.perf_counter() - start)
    return 2 * _SIZE**3 / min(times) / 1e9


def measure(preset: str, work: Path, rounds: int, threads: int) -> dict[str, Any]:
    """All sides of one preset, in turn."""
    from perceiver_export.exporter import export
    from perceiver_export.runtimes.bundle import open_bundle
    from tests.benchmarks.plain_models import plain_export, plain_feeds, plain_scale, transformers_model

    bundle = work / f"{preset}-folded"
    plain = work / f"{preset}-plain" / "model.onnx"
    if not (plain.is_file() and (bundle / "manifest.json").is_file()):
        model = transformers_model(preset)
        assert model is not None
        model.save_pretrained(work / f"{preset}-checkpoint")
        export(work / f"{preset}-checkpoint", bundle, overwrite=True)
        feeds = golden(bundle)
        plain_export(preset, model, feeds, plain)
        del model
    (part,) = open_bundle(bundle).manifest.parts.values()
    feeds = golden(bundle)
    np.savez(work / "folded.npz", allow_pickle=False, **feeds)
    np.savez(work / "plain.npz", allow_pickle=False, **plain_feeds(preset, feeds))
    sides = {f"{kind} {engine}": (kind, engine) for engine in ENGINES for kind in ("folded", "plain")}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    outputs: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for side, (kind, engine) in sides.items():
            source = bundle if kind == "folded" else plain
            found[side].append(in_a_process(kind, source, engine, work / f"{kind}.npz", work / "out.npy", threads))
            outputs[side] = np.load(work / "out.npy") * (plain_scale(preset) if kind == "plain" else 1)
    reference = outputs["plain ort"]
    scale = float(np.abs(reference).max())
    ms = {side: float(np.median([one["ms"] for one in runs])) for side, runs in found.items()}
    peak = {side: float(np.median([one["peak"] for one in runs])) for side, runs in found.items()}
    flops = sum(stage.flops for stage in part.stages)
    rates = {engine: in_a_process_rate(engine, threads) for engine in ENGINES}
    return {
        "preset": preset,
        "milliseconds": ms,
        "peak MiB": peak,
        "predicted MiB": {engine: predicted(bundle, found[f"folded {engine}"][0]["before"]) for engine in ENGINES},
        "largest difference from plain": {
            side: float(np.abs(array.reshape(reference.shape) - reference).max() / scale)
            for side, array in outputs.items()
        },
        "best plain over best folded": min(ms["plain ort"], ms["plain openvino"])
        / min(ms["folded ort"], ms["folded openvino"]),
        "plain ort over folded ort": ms["plain ort"] / ms["folded ort"],
        "GFLOP of the folded graph": flops / 1e9,
        "GFLOP/s of a large product": rates,
        "share of the engine's rate": {
            engine: flops / 1e6 / ms[f"folded {engine}"] / rate for engine, rate in rates.items()
        },
    }


def predicted(bundle: Path, before: float) -> float:
    """MiB of a process: planned activations, weights, and what was there before."""
    from perceiver_export.runtimes.bundle import open_bundle

    manifest = open_bundle(bundle).manifest
    (part,) = manifest.parts.values()
    assert part.plan is not None
    return (part.plan.peak + manifest.files["model.weights"].size) / 2**20 + before


def golden(bundle: Path) -> dict[str, np.ndarray]:
    """The inputs that the bundle was verified with."""
    with np.load(bundle / "golden.npz") as arrays:
        return {name.removeprefix("input/"): arrays[name] for name in arrays if name.startswith("input/")}


def in_a_process(kind: str, source: Path, engine: str, feeds: Path, output: Path, threads: int) -> dict[str, float]:
    """`run_side` in a process of its own."""
    answer: dict[str, float] = _call("--side", kind, str(source), engine, str(feeds), str(output), str(threads))
    return answer


def in_a_process_rate(engine: str, threads: int) -> float:
    """`gemm_rate` in a process of its own."""
    rate: float = _call("--rate", engine, str(threads))
    return rate


def _call(*arguments: str) -> Any:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: list[dict[str, Any]]) -> str:
    """One row a preset, as Markdown."""
    lines = [
        "| preset | folded ms: ort, openvino | plain ms: ort, openvino | best over best | on ort | MiB on ort, plain "
        "| predicted over measured | GFLOP/s of a product on ort | share of it |",
        "|" + "---|" * 9,
    ]
    for one in results:
        ms, peak, share = one["milliseconds"], one["peak MiB"], one["share of the engine's rate"]["ort"]
        cells = [
            one["preset"],
            *(", ".join(f"{ms[f'{kind} {engine}']:.0f}" for engine in ENGINES) for kind in ("folded", "plain")),
            f"{one['best plain over best folded']:.2f}",
            f"{one['plain ort over folded ort']:.2f}",
            f"{peak['folded ort']:.0f}, {peak['plain ort']:.0f}",
            f"{one['predicted MiB']['ort'] / peak['folded ort']:.2f}",
            f"{one['GFLOP/s of a large product']['ort']:.0f}",
            f"{share:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        kind, source, engine, feeds, output, threads = sys.argv[2:]
        print(json.dumps(run_side(kind, Path(source), engine, Path(feeds), Path(output), int(threads))))
        return
    if sys.argv[1:2] == ["--rate"]:
        print(json.dumps(gemm_rate(sys.argv[2], int(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for preset in arguments.presets:
            results.append(measure(preset, work, arguments.rounds, arguments.threads))
            print(json.dumps(results[-1], indent=1), flush=True)
            worst = max(results[-1]["largest difference from plain"].values())
            if worst > AGREE:
                raise SystemExit(f"{preset}: outputs differ by {worst:.1e} of their scale, {AGREE:.0e} is allowed")
    print(table(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
