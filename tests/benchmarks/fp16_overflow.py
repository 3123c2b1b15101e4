# SPDX-License-Identifier: Apache-2.0
"""Full-size presets whose activations overflow fp16: a blind cast breaks, a cast that knows the magnitudes does not.

    python -m tests.benchmarks.fp16_overflow [PRESET…] [--factor 1e5]

The first linear layer of every MLP is multiplied by `--factor` and the second divided by it. The graph then runs on
ONNX Runtime's CPU in fp32, in fp16 with every node rounded, and in fp16 with the magnitudes taken into account.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.graphs import open_session, sqnr
from perceiver_export.calibration.lowering.half import to_half
from perceiver_export.calibration.lowering.tensorrt import emulate, magnitudes
from perceiver_export.exporter.trace import sample_inputs
from perceiver_export.runtimes.engines.backend import Array, Feeds
from tests.benchmarks.harness import Row, command
from tests.preset_graphs import preset_parts, traced

PRESETS = (
    *("language-bytes", "imagenet-learned", "imagenet-fourier", "imagenet-conv"),
    *("optical-flow", "audioset-raw", "starcraft"),
)


def measure(work: Path, presets: tuple[str, ...] = PRESETS, factor: float = 1e5) -> Iterator[Row]:
    """SQNR is that of the outputs against fp32, in dB; nodes in fp32 are those that the magnitudes kept there."""
    for name in presets:
        path, feeds = scaled(name, factor, work)
        hazards = magnitudes(path, feeds)
        expected: Array = open_session(ir.load(path), path.parent).run(None, dict(feeds))[0]
        _, blind = run_half(path, feeds, {})
        kept, found = run_half(path, feeds, hazards)
        finite = bool(np.isfinite(found).all())
        yield {
            "preset": name,
            "largest": max(value for value in hazards.values() if value < 1e20),  # masks are larger, and are clamped
            "finite when cast blindly": bool(np.isfinite(blind).all()),
            "nodes": sum(1 for _ in ir.load(path).graph),
            "nodes in fp32": len(kept),
            "SQNR": sqnr(expected, found) if finite else float("nan"),
            "held": finite,
        }


def scaled(name: str, factor: float, work: Path) -> tuple[Path, Feeds]:
    """The preset's first graph with the MLPs scaled, and inputs for it."""
    config, (part, *_) = preset_parts(name)
    model, path = traced(part, config, fold=True), work / "model.onnx"
    for key, value in model.graph.initializers.items():
        if ".mlp.hidden." in key or ".mlp.output.weight" in key:
            assert value.const_value is not None
            array = value.const_value.numpy() * np.float32(factor if "hidden" in key else 1 / factor)
            value.const_value = ir.tensor(array, name=key)
    ir.save(model, path, external_data="model.weights")
    return path, sample_inputs(part, config, part.typical, seed=0)


def run_half(path: Path, feeds: Feeds, hazards: dict[str, float]) -> tuple[dict[str, str], Array]:
    model = ir.load(path)
    kept = to_half(model, "fp16", hazards)
    emulate(model)
    output: Array = open_session(model, path.parent).run(None, dict(feeds))[0]
    return kept, output


if __name__ == "__main__":
    command(measure)
