# SPDX-License-Identifier: Apache-2.0
"""calibration.json: how a bundle was quantized, on what data, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from perceiver_export.calibration.data_report import DataReport
from perceiver_export.calibration.gates import Gate
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import BundleError

CALIBRATION = "calibration.json"
_VERSION = 1

POLICY = (
    "linears only: products of activations with weights, int8 with a scale for each output channel, int4 with one for "
    "each block of inputs as well; activations, where they are integers, one scale a tensor, symmetric; attention "
    "products, softmax, LayerNorm, residuals, GELU and positions stay float"
)


class Layer(msgspec.Struct, frozen=True):
    """One run of a linear: the kernel that ran it as the engine calls it, and whether that multiplies integers."""

    name: str
    group: str
    macs: int
    kernel: str
    integer: bool


class Coverage(msgspec.Struct, frozen=True):
    """Of one part on one target. ``share`` is that of multiply-adds."""

    target: str
    engine: str
    layers: tuple[Layer, ...]

    @property
    def share(self) -> float:
        """Multiply-adds in integer kernels by all of linears; 1 where there are none."""
        return share(self.layers)

    @property
    def in_float(self) -> tuple[Layer, ...]:
        """Layers that run in float, the largest first."""
        return tuple(sorted((one for one in self.layers if not one.integer), key=lambda one: -one.macs))


def share(layers: Sequence[Layer]) -> float:
    """Multiply-adds in integer kernels by all; 1 where there are none."""
    total = sum(layer.macs for layer in layers)
    return sum(layer.macs for layer in layers if layer.integer) / total if total else 1.0


class Range(msgspec.Struct, frozen=True):
    """An activation that linears read: its exact bounds, and the scale it was given (None: it stays float)."""

    name: str
    low: float
    high: float
    scale: float | None


class Fp16Hazard(msgspec.Struct, frozen=True):
    """A tensor that fp16 would overflow: its largest value, or the number of terms in its sum."""

    name: str
    largest: float
    depth: int


class LinearRecord(msgspec.Struct, frozen=True):
    """One run of a linear: ``sqnr`` is its own product's on the sampled rows, in dB; ``alpha`` is smoothing's."""

    name: str
    group: str
    scheme: str
    macs: int
    sqnr: float | None
    alpha: float | None


class Excluded(msgspec.Struct, frozen=True):
    """A product with a constant that stays float by policy; ``share`` is of the multiply-adds of all of them."""

    name: str
    share: float
    reason: str


class PartRecord(msgspec.Struct, frozen=True):
    """One graph."""

    linears: tuple[LinearRecord, ...]
    ranges: tuple[Range, ...]
    hazards: tuple[Fp16Hazard, ...]
    excluded: tuple[Excluded, ...]
    coverage: tuple[Coverage, ...] = ()


class Speed(msgspec.Struct, frozen=True):
    """Milliseconds a call of all parts, one after the other, in turn with fp32; ``ratio`` fp32 by quantized."""

    target: str
    fp32: float
    quantized: float

    @property
    def ratio(self) -> float:
        """How many times faster than fp32."""
        return self.fp32 / self.quantized


class OutputEffect(msgspec.Struct, frozen=True):
    """Outputs of the quantized bundle against the fp32 bundle on calibration samples, on ONNX Runtime."""

    output: str
    sqnr: float
    agreement: float | None  # of the largest score, where the output holds scores


class Calibration(msgspec.Struct, frozen=True):
    """The whole of calibration.json but certificates. ``gates`` are those that held on the calibration data, which
    proves little.
    """

    scheme: str
    method: str
    weight_bits: int
    smooth: bool
    correct_bias: bool
    precision: dict[str, str]
    data: DataReport
    parts: dict[str, PartRecord]
    effects: tuple[OutputEffect, ...]
    speeds: tuple[Speed, ...]
    machine: str
    instruction_set: tuple[str, ...]
    warnings: tuple[str, ...]
    policy: str = POLICY
    searched: tuple[str, ...] = ()  # digests of the samples that precisions were chosen on
    gates: tuple[Gate, ...] = ()
    schema_version: int = _VERSION

    @property
    def how(self) -> str:
        """The scheme in words, with the layers that have another one; ranges, and the bits of weights that are
        multiplied as integers, only where any are.
        """
        layers = {(name, one.group): one.scheme for name, part in self.parts.items() for one in part.linears}
        counts = Counter(layers.values())
        ranges = f", ranges by {self.method}, weights of {self.weight_bits} bits" if counts["int8"] else ""
        others = [f"{count} {scheme}" for scheme, count in counts.items() if scheme != self.scheme]
        return f"{self.scheme}{ranges}" + (f"; of {len(layers)} layers {', '.join(others)}" if others else "")


def read_calibration(bundle: Bundle) -> Calibration | None:
    """A quantized bundle's record; None where the bundle is not quantized. Raises BundleError."""
    if CALIBRATION not in bundle.manifest.files or bundle.manifest.quantization is None:
        return None
    try:
        return msgspec.json.decode(bundle.file(CALIBRATION).read_bytes(), type=Calibration)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{CALIBRATION} cannot be read: {error}", "copy or quantize the bundle again") from error


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write it as indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n")
