# SPDX-License-Identifier: Apache-2.0
"""What a benchmark compares: a bundle or an ONNX file on a target, and the inputs that it is given."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from perceiver_export.runtimes.bundle import open_bundle
from perceiver_export.runtimes.comparison import compare
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.loading import load, load_onnx
from perceiver_export.runtimes.manifest import TensorSpec
from perceiver_export.runtimes.runtime import Array, Runtime

# How far outputs may be from torch's in fp32, as a share of the output's scale: what export allows, and for fewer bits
# in proportion to what one rounding costs (2^-11 and 2^-8 against 2^-24, with room for the depth of a model).
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1}


class Side(msgspec.Struct, frozen=True):
    """One of the things measured."""

    path: str
    device: str
    part: str | None
    threads: int | None
    precision: Precision | None = None  # of the engine; a graph has its own

    @property
    def is_graph(self) -> bool:
        """An ONNX file rather than a bundle."""
        return self.path.endswith(".onnx") and Path(self.path).is_file()


def open_side(side: Side) -> Runtime:
    """Load it. Raises what `load` raises."""
    if side.is_graph:
        return load_onnx(side.path, side.device, side.threads)
    return load(side.path, side.device, side.part, side.threads, precision=side.precision)


def side_feeds(side: Side, runtime: Runtime) -> dict[str, Array]:
    """The golden inputs of a bundle, random ones where there are none."""
    generator = np.random.default_rng(0)
    golden = _golden(side, "input")
    return {spec.name: golden.get(spec.name, _random(spec, generator)) for spec in runtime.inputs}


def difference_from_golden(side: Side, outputs: dict[str, Array]) -> float | None:
    """Largest difference from torch's fp32 outputs, as a share of each output's scale; None where none are kept."""
    golden = _golden(side, "output")
    shared = [name for name in outputs if name in golden]
    if not shared:
        return None
    return max(compare(outputs[name], golden[name], 0.0).difference for name in shared)


def _golden(side: Side, kind: str) -> dict[str, Array]:
    """Arrays by name. Of a split bundle measured whole the inputs are the encoder's; it has no golden outputs."""
    if side.is_graph:
        return {}
    bundle = open_bundle(side.path)
    if "golden.npz" not in bundle.manifest.files:
        return {}
    prefix = f"{kind}/"
    if bundle.split:
        if side.part is None and kind == "output":
            return {}
        prefix = f"{side.part or 'encoder'}/{kind}/"
    with np.load(bundle.file("golden.npz"), allow_pickle=False) as golden:
        return {key.removeprefix(prefix): golden[key] for key in golden.files if key.startswith(prefix)}


def _random(spec: TensorSpec, generator: np.random.Generator) -> Array:
    shape = tuple(dim if isinstance(dim, int) else spec.ranges.get(dim, (1, 1))[0] for dim in spec.shape)
    if spec.dtype == "float32":
        return generator.normal(size=shape).astype(np.float32)
    return np.zeros(shape, spec.dtype)
