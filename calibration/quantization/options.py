# SPDX-License-Identifier: Apache-2.0
"""How to quantize, checked when it is said. Imports nothing heavy: the command line reads its help from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from perceiver_export.calibration.options import option
from perceiver_export.calibration.validation.options import Gates, check_percent
from perceiver_export.runtimes.errors import UsageError, check_choice, check_kind, check_whole

Scheme = Literal["int8", "int8-weights", "int4-weights", "float"]
Method = Literal["mse", "minmax", "percentile"]


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of `quantize`, `search` and `measure_sensitivity`; `quantize --help` prints the doc of each field.

    ``precision`` gives layers whose names match a pattern (`encoder.*.mlp.*`) another scheme; of several patterns the
    last one that matches decides, and ``keep_float`` comes last of all. ``gates`` are held against the fp32 bundle.
    ``truncate`` changes how DATA is read, not the new bundle. Raises UsageError: a value that makes no sense.
    """

    scheme: Scheme = option("int8", "int8, int8-weights or int4-weights.")
    method: Method = option("mse", "How ranges are found: mse, minmax or percentile.")
    samples: int = option(128, "Calibrate on this many samples, evenly spread over the data.")
    smooth: bool = option(True, "Fold SmoothQuant into LayerNorms and value projections.")
    correct_bias: bool = option(True, "Take the mean error out of biases.")
    weight_bits: int | None = option(None, "8, or 7 for x86 CPUs without VNNI. By default what this machine needs.")
    precision: Mapping[str, Scheme] = option(dict, "Another scheme for some layers.", "NAME=SCHEME")
    keep_float: Sequence[str] = option(tuple, "Layers that stay float: names, or patterns (decoder.*).", "NAME")
    min_coverage: float = option(100.0, "Least share of int8 multiply-adds in integer kernels, in percent.")
    gates: Gates = Gates()
    truncate: bool = option(False, "Cut texts that are longer than the model, instead of leaving them out.")
    overwrite: bool = option(False, "Replace a bundle that is already there.")
    threads: int | None = option(None, "Threads of the engine; by default the engine chooses.")

    def __post_init__(self) -> None:
        from perceiver_export.runtimes.opening import check_threads

        check_choice("scheme", self.scheme, get_args(Scheme))
        if self.scheme == "float":
            raise UsageError("scheme float leaves nothing to quantize", "use int8, int8-weights or int4-weights")
        check_choice("method", self.method, get_args(Method))
        check_whole("samples", self.samples, 1, None, "give 1 or more; 128 are enough for most")
        if self.weight_bits not in (None, 7, 8):
            raise UsageError(f"weight_bits is {self.weight_bits!r}", "give 7 or 8; int4-weights is a scheme")
        check_kind("precision", self.precision, Mapping, "a scheme by pattern of layer names")
        if isinstance(self.keep_float, str) or not isinstance(self.keep_float, Sequence):
            raise UsageError(f"keep_float is {self.keep_float!r}", "give a list of patterns of layer names")
        for pattern, scheme in self.schemes.items():
            check_kind("a pattern of layer names", pattern, str, "text, as encoder.*.mlp.*")
            check_choice("scheme", scheme, get_args(Scheme))
        check_kind("gates", self.gates, Gates, "Gates(max_drop=…, …)")
        check_percent("--min-coverage", self.min_coverage)
        check_threads(self.threads)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each pattern of layer names, those that stay float included."""
        return {**self.precision, **dict.fromkeys(self.keep_float, "float")}

    @property
    def bits(self) -> int:
        """Bits of weights that are multiplied as integers: as asked, else what this machine needs."""
        from perceiver_export.runtimes.machine import saturates

        return self.weight_bits or (7 if saturates() else 8)
