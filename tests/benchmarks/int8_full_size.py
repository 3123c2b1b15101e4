# SPDX-License-Identifier: Apache-2.0
"""Integer kernels, size and speed of the full-size architectures in int8, beside plain fp32 exports (random weights).

    python -m tests.benchmarks.int8_full_size [PRESET…] [--samples 2] [--rounds 3] [--threads 2] [--no-plain] [--bf16]

One model with random weights is exported (folded) and quantized on random samples, and exported by transformers →
torch.onnx. A row says which share of the linears' multiply-adds ran in integer kernels, what was excluded, the bytes of
graph and weights over those of the fp32 bundle, the largest resident size while quantizing, and milliseconds a call of
all sides in fresh processes that take turns. The speed-up is over the faster engine with the plain export. `--bf16`
adds int8 on OpenVINO with floats of 16 bits. Video has no plain side: transformers' takes more memory than most
machines have. Weights are random, so this says nothing about accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.harness import Row, command, fresh, in_turn, medians
from tests.benchmarks.sides import ENGINES, golden_inputs, make_pair, save_feeds, timed

if TYPE_CHECKING:
    from perceiver_export.runtimes import Bundle

VIDEO = "video-autoencoding"
PRESETS = ("imagenet-fourier", "imagenet-learned", "imagenet-conv", "language-bytes", "optical-flow", VIDEO)


def measure(
    work: Path,
    presets: tuple[str, ...] = PRESETS,
    samples: int = 2,
    rounds: int = 3,
    threads: int = 2,
    plain: bool = True,
    bf16: bool = False,
) -> Iterator[Row]:
    """A row a preset; no times with ``rounds`` 0."""
    from perceiver_export.runtimes import open_bundle

    for preset in presets:
        folded, graph = make_pair(preset, work, plain and preset != VIDEO)
        out, peak = work / f"{preset}-int8", None
        if not (out / "manifest.json").is_file():
            peak = fresh(quantize_random, folded, out, samples, threads)
        row = {"preset": preset, **describe(open_bundle(folded), open_bundle(out)), "MiB while quantizing": peak}
        if rounds:
            sources = {"fp32": folded, "int8": out} | ({"plain": graph} if graph else {})
            row |= speed(preset, work, sources, rounds, threads, bf16)
        yield row


def quantize_random(source: str, out: str, samples: int, threads: int) -> float:
    """The largest MiB of the process."""
    from perceiver_export.calibration import QuantizeOptions, quantize
    from perceiver_export.runtimes.machine import peak_memory

    quantize(source, "random", out, QuantizeOptions(samples=samples, min_coverage=0, threads=threads))
    return peak_memory()


def describe(fp32: Bundle, int8: Bundle) -> Row:
    """Linears, coverage and bytes."""
    from perceiver_export.calibration.quantization.record import read_calibration

    calibration, quantization = read_calibration(int8), int8.manifest.quantization
    assert calibration is not None
    assert quantization is not None
    parts = calibration.parts
    return {
        "linears": {name: len(part.linears) for name, part in parts.items()},
        "integer share": quantization.integer_share,
        "excluded": {name: sum(one.share for one in part.excluded) for name, part in parts.items()},
        "kept float": quantization.kept_float,
        "not integer": [
            f"{one.target}: {layer.name} ({layer.kernel})"
            for part in parts.values()
            for one in part.coverage
            for layer in one.layers
            if not layer.integer
        ],
        "bytes over fp32's": graph_bytes(int8) / graph_bytes(fp32),
    }


def graph_bytes(bundle: Bundle) -> int:
    """Bytes of the canonical graphs and of the weights."""
    files = {part.file for part in bundle.manifest.parts.values()} | {"model.weights"}
    return sum(entry.size for name, entry in bundle.manifest.files.items() if name in files)


def speed(preset: str, work: Path, sources: dict[str, Path], rounds: int, threads: int, bf16: bool) -> Row:
    """Median milliseconds of a call, by side and engine, and the ratios."""
    inputs = golden_inputs(work / f"{preset}-folded")
    feeds = dict.fromkeys(sources, save_feeds(work, "folded", inputs))
    if "plain" in sources:
        from tests.benchmarks.plain_models import plain_feeds

        feeds["plain"] = save_feeds(work, "plain", plain_feeds(preset, inputs))
    sides = {
        f"{side} {engine}": partial(timed, source, engine, threads, feeds[side])
        for engine in ENGINES
        for side, source in sources.items()
    }
    if bf16:
        sides["int8-bf16 openvino"] = partial(timed, sources["int8"], "openvino", threads, feeds["int8"], "bf16")
    times = {side: one["ms"] for side, one in medians(in_turn(sides, rounds)).items()}
    best = {
        side: min(ms for name, ms in times.items() if name.split()[0] == side)
        for side in {name.split()[0] for name in times}
    }
    ratios = {
        f"{side} over {other}": best[other] / best[side]
        for side in best
        for other in ("fp32", "plain")
        if "int8" in side and other in best
    }
    return {"ms": times, "speed-ups": ratios}


if __name__ == "__main__":
    command(measure)
