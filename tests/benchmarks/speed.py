# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of our bundles and of plain exports of the same models, in every precision of this CPU

    python -m tests.benchmarks.speed [PRESET…] [--rounds 3] [--threads 2] [--torch] [--no-int8] [--figure FILE.svg]

Each model has random weights. It is exported by `perceiver-export export`, quantized on random samples, and exported
from transformers by torch.onnx. Every figure comes from fresh processes that load, run once, and take the median of the
calls in the next second (at least two). Sides take turns, and the table has the median of the rounds. `plain openvino`
is OpenVINO with its default settings: on a CPU with bf16 it computes in bf16. `plain ort dynamic` is onnxruntime's
dynamic int8 of the plain graph; `plain openvino nncf` is NNCF's static int8 of it, if the package `nncf` is installed.
siglip_head, blip2_qformer and detr_decoder are transformers' modules at released sizes. The outputs of all fp32 sides
must agree within 1e-4 of their scale; random weights say nothing about accuracy in lower precisions. With `--work`,
presets that were already measured in that folder are not measured again.

In the second table, `default over our best` divides the time of the faster plain engine with default settings by that
of our fastest side; `best plain` also includes int8 and torch. In the last table, `share of rates` divides the time
that the machine's rates allow for the folded fp32 graph by the measured time: the FLOPs of products at the rate of one
product, and the elements of all softmaxes at the rate of one softmax. Each rate is the best of five sizes of square
matrices, measured in the same run on the same engine into memory that was allocated before.
Memory is the peak resident size of the process; `predicted MiB` adds up the plan, the weights, and the process before
the load.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.harness import Row, command, fresh, in_turn, medians, seconds
from tests.benchmarks.int8_full_size import quantize_random
from tests.benchmarks.sides import ENGINES, golden_inputs, make_pair, output_of, save_feeds, timed

PRESETS = (
    *("optical-flow", "imagenet-fourier", "imagenet-learned", "imagenet-conv", "language-bytes"),
    *("siglip_head", "blip2_qformer", "detr_decoder"),
)
AGREE = 1e-4
_FP32 = ("fp32 ort", "fp32 openvino")
_SIZES = (256, 512, 1024, 2048, 3072)  # of the square matrices that measure an engine's rates


def measure(
    work: Path,
    presets: tuple[str, ...] = PRESETS,
    rounds: int = 3,
    threads: int = 2,
    torch: bool = False,
    int8: bool = True,
    figure: Path | None = None,
) -> Iterator[Row]:
    """A row per side of each preset, then a row per preset; ``figure`` is a file for the bar chart."""
    drawn, summaries = {}, []
    for preset in presets:
        kept = work / f"{preset}.json"
        if not kept.is_file():
            rates = {engine: fresh(engine_rates, engine, threads) for engine in ENGINES}
            sides = sides_of(preset, work, threads, torch, int8)
            kept.write_text(json.dumps(compare(preset, work, rounds, threads, sides, rates)))
        rows, summary = json.loads(kept.read_text())
        yield from rows
        ms = drawn[preset] = {row["side"]: row["ms"] for row in rows}
        ours = min(ms[name] for name in ms if not name.startswith("plain"))
        default = min(ms["plain ort"], ms["plain openvino"])
        summaries.append({"preset": preset, "default over our best": default / ours} | summary)
    yield from ({name: value for name, value in row.items() if name != "allowed"} for row in summaries)
    yield from ({"preset": row["preset"], **row["allowed"]} for row in summaries)
    if figure:
        draw(drawn, figure)


def draw(ms: Mapping[str, Mapping[str, float]], figure: Path) -> None:
    """A panel per preset, a bar per side: milliseconds per call, ours in color."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "perceiver-export"  # the same numbers, the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    rows = -(-len(ms) // 2)
    drawn, panels = pyplot.subplots(rows, 2, figsize=(10, 2.6 * rows), layout="constrained", squeeze=False)
    for panel in panels.flat[len(ms) :]:
        panel.set_axis_off()
    for panel, (preset, sides) in zip(panels.flat, ms.items(), strict=False):
        names = sorted(sides, key=lambda name: -sides[name])
        colors = ["#b0b0b0" if name.startswith("plain") else "#2a6fbb" for name in names]
        bars = panel.barh(names, [sides[name] for name in names], color=colors)
        shown = [f"{sides[name]:,.{0 if sides[name] >= 100 else 1}f}" for name in names]
        panel.bar_label(bars, shown, padding=2, fontsize=7)
        panel.set_title(f"{preset}, ms a call", fontsize=9)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    drawn.savefig(figure, metadata={"Date": None})


def sides_of(preset: str, work: Path, threads: int, torch: bool, int8: bool) -> dict[str, tuple[Path, str, str | None]]:
    """Source, engine and precision of each side; None is the engine's default precision."""
    from perceiver_export.runtimes.machine import cpu_features
    from tests.benchmarks.plain_models import plain_feeds

    bundle, graph = make_pair(preset, work)
    assert graph is not None
    bf16 = "avx512_bf16" in cpu_features()
    found: dict[str, tuple[Path, str, str | None]] = {
        "plain ort": (graph, "ort", None),
        "plain openvino f32": (graph, "openvino", "fp32"),
        "plain openvino": (graph, "openvino", None),
        "fp32 ort": (bundle, "ort", "fp32"),
        "fp32 openvino": (bundle, "openvino", "fp32"),
    }
    if bf16:
        found["bf16 openvino"] = (bundle, "openvino", "bf16")
    if int8:
        quantized, dynamic = work / f"{preset}-int8", graph.with_name("dynamic.onnx")
        if not (quantized / "manifest.json").is_file():
            fresh(quantize_random, bundle, quantized, 2, threads)
        if not dynamic.is_file():
            fresh(quantize_dynamic, graph, dynamic)
        found["plain ort dynamic"] = (dynamic, "ort", None)
        if find_spec("nncf"):
            static = graph.with_name("nncf.xml")
            if not static.is_file():
                fresh(
                    quantize_nncf, graph, save_feeds(work, "nncf", plain_feeds(preset, golden_inputs(bundle))), static
                )
            found["plain openvino nncf"] = (static, "openvino", None)
        found |= {f"int8 {engine}": (quantized, engine, None) for engine in ENGINES}
        if bf16:
            found["int8+bf16 openvino"] = (quantized, "openvino", "bf16")
    if torch:
        checkpoint = work / f"{preset}-checkpoint"
        found |= {f"plain {name}": (checkpoint, name, None) for name in ("torch", "torch.compile")}
    return found


def quantize_dynamic(graph: str, out: str) -> None:
    """onnxruntime's int8 of weights, with activations quantized in each call."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(graph, out, use_external_data_format=True)


def quantize_nncf(graph: str, feeds: str, out: str) -> None:
    """NNCF's int8 for transformers, calibrated on one sample; the rest in the default precision."""
    import nncf
    import openvino

    samples = nncf.Dataset([dict(np.load(feeds))])
    model = nncf.quantize(openvino.Core().read_model(graph), samples, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(model, out, compress_to_fp16=False)


def compare(
    preset: str,
    work: Path,
    rounds: int,
    threads: int,
    sides: Mapping[str, tuple[Path, str, str | None]],
    rates: Mapping[str, Mapping[str, float]],
) -> tuple[list[Row], Row]:
    """All sides of one preset, in turn: a row per side, and the summary."""
    from tests.benchmarks.plain_models import plain_feeds, plain_scale

    feeds = golden_inputs(work / f"{preset}-folded")
    files = {"plain": save_feeds(work, "plain", plain_feeds(preset, feeds)), "ours": save_feeds(work, "ours", feeds)}
    calls, outputs = {}, {}
    found: dict[str, list[Row]] = {}
    for name, (source, engine, precision) in sides.items():
        kind = "plain" if name.startswith("plain") else "ours"
        calls[name] = partial(timed, source, engine, threads, files[kind], precision)
        found[name] = [calls[name]()]
        outputs[name] = output_of(files[kind], engine) * (plain_scale(preset) if kind == "plain" else 1.0)
    for name, times in in_turn(calls, rounds - 1).items():
        found[name] += times
    middle = medians(found)
    ms = {name: one["ms"] for name, one in middle.items()}
    plain, exact = [name for name in ms if name.startswith("plain")], ("plain ort", "plain openvino f32")
    best = min(ms[name] for name in plain)
    difference = max(_distance(outputs[name], outputs[exact[0]]) for name in (*exact, *_FP32))
    rows = [
        {
            "preset": preset,
            "side": name,
            "ms": ms[name],
            "least to most": [min(one["ms"] for one in times), max(one["ms"] for one in times)],
            "best plain over it": best / ms[name],
            "MiB": middle[name]["MiB"],
        }
        for name, times in found.items()
    ]
    return rows, {
        "preset": preset,
        "best plain over our best": best / min(ms[name] for name in ms if name not in plain),
        "fp32 over fp32": min(ms[name] for name in exact) / min(ms[name] for name in _FP32),
        "largest difference in fp32": difference,
        "held": difference <= AGREE,
        "allowed": _allowed(work / f"{preset}-folded", middle, rates),
    }


def _distance(found: Any, reference: Any) -> float:
    return float(np.abs(found.reshape(reference.shape) - reference).max() / np.abs(reference).max())


def _allowed(path: Path, middle: Mapping[str, Any], rates: Mapping[str, Mapping[str, float]]) -> Row:
    """The folded graph's work, its planned memory, and the share of the machine's rates that fp32 reaches."""
    from perceiver_export.runtimes.bundle import open_bundle

    manifest = open_bundle(path).manifest
    (part,) = manifest.parts.values()
    assert part.plan is not None
    gflop, scores = (number / 1e9 for number in work_of(path / part.file))
    planned = (part.plan.peak + manifest.files["model.weights"].size) / 2**20
    ms = {one: 1e3 * (gflop / rate["GFLOP/s"] + scores / rate["G softmax/s"]) for one, rate in rates.items()}
    return {
        "predicted MiB": {one: planned + middle[f"fp32 {one}"]["MiB before"] for one in ENGINES},
        "GFLOP": gflop,
        "G softmax elements": scores,
        "rates": rates,
        "share of rates": {one: ms[one] / middle[f"fp32 {one}"]["ms"] for one in ENGINES},
    }


def work_of(path: Path) -> tuple[int, int]:
    """The FLOPs of all products and the elements of all softmaxes of a graph with fixed sizes."""
    from perceiver_export.calibration.graphs import PRODUCTS, dims, node_flops, read_graph, with_shapes

    nodes = list(with_shapes(read_graph(path)).graph)
    flops = sum(node_flops(node) for node in nodes if node.op_type in PRODUCTS)
    return flops, sum(math.prod(dims(node.outputs[0])) for node in nodes if node.op_type == "Softmax")


def engine_rates(engine: str, threads: int) -> dict[str, float]:
    """Rates of one product of square matrices, and of one softmax over rows of that size, each at its best size."""
    return {
        "GFLOP/s": max(2e-9 * size**3 / _best_seconds("MatMul(a, b)", size, engine, threads) for size in _SIZES),
        "G softmax/s": max(1e-9 * size**2 / _best_seconds("Softmax(a)", size, engine, threads) for size in _SIZES),
    }


def _best_seconds(node: str, size: int, engine: str, threads: int) -> float:
    from perceiver_export.runtimes.loading import load_onnx
    from tests.calibration.onnx_text import write

    matrix = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    body = f"(float[{size},{size}] a) => (float[{size},{size}] y) {{ y = {node} }}"
    weights: dict[str, Any] = {"b": matrix} if "b" in node else {}
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "one.onnx", body, **weights)
        runtime, out = load_onnx(path, f"{engine}-cpu", threads), {"y": np.empty_like(matrix)}
        return min(seconds(lambda: runtime.run({"a": matrix}, out)) for _ in range(12))


if __name__ == "__main__":
    command(measure)
