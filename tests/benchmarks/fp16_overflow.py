# SPDX-License-Identifier: Apache-2.0
"""Full-size presets whose insides overflow fp16: what is cast blindly breaks, what was seen to overflow is caught.

The first linear of every MLP is multiplied by `--factor` and the second divided by it. The graph then runs in fp32 on
ONNX Runtime's CPU, in fp16 with every node rounded without being told what overflowed, and in fp16 with it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[2]))  # `tests`, when it is run as a command
from perceiver_export.calibration.lowering.emulation import emulate
from perceiver_export.calibration.lowering.half import to_half
from perceiver_export.calibration.lowering.magnitudes import magnitudes
from perceiver_export.calibration.lowering.tensorrt_bundle import sqnr
from perceiver_export.calibration.sessions import open_session
from perceiver_export.exporter.sample_inputs import sample_inputs
from perceiver_export.exporter.trace import trace
from perceiver_export.runtimes.engines.backend import Array, Feeds
from tests.preset_graphs import preset_parts

_PRESETS = (
    "language-bytes",
    "imagenet-learned",
    "imagenet-fourier",
    "imagenet-conv",
    "optical-flow",
    "audioset-raw",
    "starcraft",
)


@dataclass(frozen=True)
class Overflow:
    """One preset. ``sqnr``: of the outputs against fp32, in dB, with the hazards told; ``kept``: nodes left in fp32."""

    preset: str
    largest: float
    finite_blind: bool
    finite: bool
    kept: int
    nodes: int
    sqnr: float


def main() -> None:
    """Print a row for each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(_PRESETS))
    parser.add_argument("--factor", type=float, default=1e5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.presets:
        rows.append(overflow(name, arguments.factor))
        if not arguments.json:
            print(rows[-1], flush=True)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
    sys.exit(not all(row.finite for row in rows))


def overflow(name: str, factor: float) -> Overflow:
    """Scale, watch, cast and run one preset."""
    config, (part, *_) = preset_parts(name)
    feeds = sample_inputs(part, config, part.typical, seed=0)
    model = trace(part, config)
    for key, value in model.graph.initializers.items():
        if ".mlp.hidden." in key or ".mlp.output.weight" in key:
            assert value.const_value is not None
            array = value.const_value.numpy() * np.float32(factor if "hidden" in key else 1 / factor)
            value.const_value = ir.tensor(array, name=key)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        ir.save(model, path, external_data="model.weights")
        del model
        hazards = magnitudes(path, feeds)
        expected: Array = open_session(ir.load(path), path.parent).run(None, dict(feeds))[0]
        _, blind = _run(path, feeds, {})
        kept, told = _run(path, feeds, hazards)
        nodes = sum(1 for _ in ir.load(path).graph)
    finite = bool(np.isfinite(told).all())
    return Overflow(
        name,
        max(value for value in hazards.values() if value < 1e20),  # masks are larger, and are clamped
        bool(np.isfinite(blind).all()),
        finite,
        len(kept),
        nodes,
        sqnr(expected, told) if finite else float("nan"),
    )


def _run(path: Path, feeds: Feeds, hazards: dict[str, float]) -> tuple[dict[str, str], Array]:
    model = ir.load(path)
    kept = to_half(model, "fp16", hazards)
    emulate(model)
    output: Array = open_session(model, path.parent).run(None, dict(feeds))[0]
    return kept, output


if __name__ == "__main__":
    main()
