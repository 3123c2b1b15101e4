# SPDX-License-Identifier: Apache-2.0
"""Integer kernels and size of the full-size architectures in int8, with random weights.

    python -m tests.benchmarks.int8_full_size [PRESET…] [--samples 2] [--threads 2]

Each row has the share of the linear layers' multiply-adds that ran in integer kernels, the excluded share, the bytes of
graph and weights over those of the fp32 bundle, and the peak resident size while quantizing. `tests.benchmarks.speed`
times the same bundles.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.harness import Row, command, fresh
from tests.benchmarks.sides import make_pair

if TYPE_CHECKING:
    from perceiver_export.runtimes import Bundle

PRESETS = (
    *("imagenet-fourier", "imagenet-learned", "imagenet-conv"),
    *("language-bytes", "optical-flow", "video-autoencoding"),
)


def measure(work: Path, presets: tuple[str, ...] = PRESETS, samples: int = 2, threads: int = 2) -> Iterator[Row]:
    """A row per preset."""
    from perceiver_export.runtimes import open_bundle

    for preset in presets:
        folded, _ = make_pair(preset, work, with_plain=False)
        out, peak = work / f"{preset}-int8", None
        if not (out / "manifest.json").is_file():
            peak = fresh(quantize_random, folded, out, samples, threads)
        yield {"preset": preset, **describe(open_bundle(folded), open_bundle(out)), "MiB while quantizing": peak}


def quantize_random(source: str, out: str, samples: int, threads: int) -> float:
    """Quantize on random samples; return the peak MiB of the process."""
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


if __name__ == "__main__":
    command(measure)
