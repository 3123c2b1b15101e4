# SPDX-License-Identifier: Apache-2.0
"""Time and memory of folded exports beside plain ones, transformers → torch.onnx, on ONNX Runtime and OpenVINO.

    python -m tests.benchmarks.folds [PRESET…] [--rounds 3] [--threads 2]

One model with random weights, saved by transformers, is exported by `perceiver-export export` and by torch.onnx. Every
figure comes from fresh processes that load, run twice and are timed on the runs after; sides take turns, the median
counts. The plain side is loaded as the engines' documentation says, the folded one by our runtime. Memory is the
largest resident size of the process, libraries and weights included; the plan predicts its activations, the weights,
and what a process has before it loads. Outputs of all sides must agree within 1e-4 of their scale. The engine's rate
is that of one large product; the share is what the folded graph's counted FLOPs reach of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from tests.benchmarks.harness import Row, command, fresh, in_turn, medians, seconds
from tests.benchmarks.sides import ENGINES, golden_inputs, make_pair, output_of, save_feeds, timed

PRESETS = ("optical-flow", "imagenet-fourier", "imagenet-learned", "imagenet-conv", "language-bytes")
AGREE = 1e-4
_SIZE = 2048  # of the square product that measures an engine's rate


def measure(work: Path, presets: tuple[str, ...] = PRESETS, rounds: int = 3, threads: int = 2) -> Iterator[Row]:
    """A row a preset."""
    rates = {engine: fresh(gemm_rate, engine, threads) for engine in ENGINES}
    for preset in presets:
        yield compare(preset, work, rounds, threads, rates)


def compare(preset: str, work: Path, rounds: int, threads: int, rates: dict[str, float]) -> Row:
    """All sides of one preset, in turn."""
    from perceiver_export.runtimes.bundle import open_bundle
    from tests.benchmarks.plain_models import plain_feeds, plain_scale

    bundle, graph = make_pair(preset, work)
    assert graph is not None
    feeds = {"folded": golden_inputs(bundle)}
    feeds["plain"] = plain_feeds(preset, feeds["folded"])
    files = {kind: save_feeds(work, kind, arrays) for kind, arrays in feeds.items()}
    sides = {
        f"{kind} {engine}": partial(timed, source, engine, threads, files[kind])
        for engine in ENGINES
        for kind, source in (("folded", bundle), ("plain", graph))
    }
    found = medians(in_turn(sides, rounds))
    ms = {side: one["ms"] for side, one in found.items()}
    outputs = [
        output_of(files[kind], engine) * scale
        for engine in ENGINES
        for kind, scale in (("plain", plain_scale(preset)), ("folded", 1.0))
    ]
    difference = (
        max(np.abs(one.reshape(outputs[0].shape) - outputs[0]).max() for one in outputs[1:]) / np.abs(outputs[0]).max()
    )
    manifest = open_bundle(bundle).manifest
    (part,) = manifest.parts.values()
    assert part.plan is not None
    flops = sum(stage.flops for stage in part.stages)
    planned = (part.plan.peak + manifest.files["model.weights"].size) / 2**20
    return {
        "preset": preset,
        "ms": ms,
        "best plain over best folded": min(ms["plain ort"], ms["plain openvino"])
        / min(ms["folded ort"], ms["folded openvino"]),
        "plain ort over folded ort": ms["plain ort"] / ms["folded ort"],
        "MiB": {side: one["MiB"] for side, one in found.items()},
        "predicted MiB": {engine: planned + found[f"folded {engine}"]["MiB before"] for engine in ENGINES},
        "GFLOP": flops / 1e9,
        "GFLOP/s of a large product": rates,
        "share of it": {engine: flops / 1e6 / ms[f"folded {engine}"] / rate for engine, rate in rates.items()},
        "largest difference": float(difference),
        "held": bool(difference <= AGREE),
    }


def gemm_rate(engine: str, threads: int) -> float:
    """GFLOP/s of one product of square matrices."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from perceiver_export.runtimes.loading import load_onnx

    matrix = np.random.default_rng(0).normal(size=(_SIZE, _SIZE)).astype(np.float32)
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [_SIZE, _SIZE]) for name in ("a", "y")]
    node, weights = helper.make_node("MatMul", ["a", "b"], ["y"]), numpy_helper.from_array(matrix, "b")
    graph = helper.make_graph([node], "product", tensors[:1], tensors[1:], [weights])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        runtime = load_onnx(path, f"{engine}-cpu", threads)
        best = min(seconds(lambda: runtime.run({"a": matrix})) for _ in range(6))
    return 2 * _SIZE**3 / best / 1e9


if __name__ == "__main__":
    command(measure)
