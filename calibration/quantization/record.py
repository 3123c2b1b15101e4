# SPDX-License-Identifier: Apache-2.0
"""calibration.json: how a bundle was quantized, on which data, and measurements of the result."""

from __future__ import annotations

from collections import Counter

import msgspec

from perceiver_export.calibration.data.fingerprints import DataReport
from perceiver_export.calibration.quantization.options import Scheme
from perceiver_export.calibration.validation.gates import Gate
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.certificates import FILE
from perceiver_export.runtimes.files import read_json

POLICY = (
    "only linear layers are quantized: weights are int8 with one scale per output channel, or int4 with one scale per "
    "block of inputs too; integer activations are symmetric with one scale per tensor; attention products, softmax, "
    "LayerNorm, residuals, GELU and positions stay float"
)


class Layer(msgspec.Struct, frozen=True):
    """One run of a linear layer: the engine's name for its kernel, and whether the kernel multiplies integers."""

    name: str
    group: str
    macs: int
    kernel: str
    integer: bool


class Coverage(msgspec.Struct, frozen=True):
    """The kernels of one part on one target."""

    target: str
    engine: str
    layers: tuple[Layer, ...]

    @property
    def share(self) -> float:
        """Multiply-adds in integer kernels as a share of all; 1 without multiply-adds."""
        total = sum(layer.macs for layer in self.layers)
        return sum(layer.macs for layer in self.layers if layer.integer) / total if total else 1.0


class Range(msgspec.Struct, frozen=True):
    """An activation that linear layers read: its exact bounds and its scale (None: it stays float)."""

    name: str
    low: float
    high: float
    scale: float | None


class Fp16Hazard(msgspec.Struct, frozen=True):
    """A tensor that would overflow fp16, with its largest value and the number of terms in its sum."""

    name: str
    largest: float
    depth: int


class LinearRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run of a linear layer: ``sqnr`` of its product on the sampled rows, in dB; ``alpha`` is smoothing's α.

    ``output_sqnr`` is the SQNR of the part's outputs with only this layer quantized, if `measure_sensitivity` ran.
    """

    name: str
    group: str
    scheme: str
    macs: int
    sqnr: float | None
    alpha: float | None
    output_sqnr: float | None = None


class GroupSensitivity(msgspec.Struct, frozen=True):
    """A layer: the least SQNR in dB of its products and of its part's outputs, its share of the multiply-adds, and the
    scheme that it was measured in.
    """

    part: str
    group: str
    product_sqnr: float
    output_sqnr: float
    share: float
    scheme: Scheme = "int8"


class Excluded(msgspec.Struct, frozen=True):
    """A product with a constant that stays float by policy; ``share`` is its share of all multiply-adds."""

    name: str
    share: float
    reason: str


class PartRecord(msgspec.Struct, frozen=True):
    """The record of one graph."""

    linears: tuple[LinearRecord, ...]
    ranges: tuple[Range, ...]
    hazards: tuple[Fp16Hazard, ...]
    excluded: tuple[Excluded, ...]
    coverage: tuple[Coverage, ...] = ()


class Speed(msgspec.Struct, frozen=True):
    """Milliseconds per call of all parts, timed alternately in fp32 and quantized.

    ``others`` has the lower precisions that the target computes in ("bf16", "int8 with bf16"). ``best`` names the
    fastest float and the fastest quantized precision; ``ratios`` are the quartiles of the second's time relative to the
    first's, round by round; ``undecided``: why they cannot be compared. Older records have none of these.
    """

    target: str
    fp32: float
    quantized: float
    others: dict[str, float] = {}
    best: tuple[str, str] = ("fp32", "")
    ratios: tuple[float, float, float] | None = None
    undecided: str = ""

    @property
    def faster(self) -> bool:
        """Whether it is faster than the fastest float precision, in at least three of four rounds if that is known."""
        found = self.quantized < self.fp32 if self.ratios is None else self.ratios[2] < 1
        return found and not self.undecided

    def __str__(self) -> str:
        times = {self.best[1].partition(" ")[0] or "quantized": self.quantized, "fp32": self.fp32, **self.others}
        shown = ", ".join(f"{name} {time:.2f} ms" for name, time in times.items())
        if self.ratios is None:
            return f"{shown}: quantized is {self.fp32 / self.quantized:.2f} × as fast as fp32"
        if self.undecided:
            return f"{shown}: not comparable"
        slowest, median, best = (1 / ratio for ratio in reversed(self.ratios))
        sides = f"{self.best[1]} is {median:.2f} × as fast as {self.best[0]}"
        return f"{shown}: {sides} ({slowest:.2f} to {best:.2f} in half of the pairs)"


class OutputEffect(msgspec.Struct, frozen=True):
    """An output of the quantized bundle compared with fp32's, on calibration samples and ONNX Runtime: SQNR in dB.

    ``agreement`` is the share of answers that are the same, if the output holds scores.
    """

    output: str
    sqnr: float
    agreement: float | None
    samples: int = 0  # 0 in bundles that did not record it


class Calibration(msgspec.Struct, frozen=True):
    """calibration.json without the certificates.

    ``gates`` were passed on the calibration data itself, which proves little. ``searched`` has the digests of the
    samples on which precisions were chosen.
    """

    scheme: str
    method: str
    weight_bits: int
    smooth: bool
    correct_bias: bool
    precision: dict[str, str]
    data: DataReport
    parts: dict[str, PartRecord]
    machine: str
    instruction_set: tuple[str, ...]
    effects: tuple[OutputEffect, ...] = ()
    speeds: tuple[Speed, ...] = ()
    warnings: tuple[str, ...] = ()
    policy: str = POLICY
    searched: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    schema_version: int = 1

    @property
    def how(self) -> str:
        """The scheme in words, with the number of layers in other schemes.

        The method for ranges and the bits of weights are omitted if no layer has integer activations.
        """
        layers = {(name, one.group): one.scheme for name, part in self.parts.items() for one in part.linears}
        counts = Counter(layers.values())
        ranges = f", ranges by {self.method}, {self.weight_bits}-bit weights" if counts["int8"] else ""
        others = [f"{count} {scheme}" for scheme, count in counts.items() if scheme != self.scheme]
        return f"{self.scheme}{ranges}" + (f"; of {len(layers)} layers {', '.join(others)}" if others else "")


def read_calibration(bundle: Bundle) -> Calibration | None:
    """A quantized bundle's record; None if the bundle is not quantized. Raises BundleError if it cannot be read."""
    if FILE not in bundle.manifest.files or bundle.manifest.quantization is None:
        return None
    return read_json(bundle.file(FILE), Calibration, hint="copy or quantize the bundle again")
