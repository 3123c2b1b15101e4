# SPDX-License-Identifier: Apache-2.0
"""Options of quantization, checked when they are created. The command line takes its help from here, so this module
imports nothing heavy.
"""

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

    ``precision`` gives layers whose names match a pattern (`encoder.*.mlp.*`) another scheme. The last matching pattern
    applies, and ``keep_float`` comes after all of ``precision``. ``gates`` compare the result with the fp32 bundle.
    ``truncate`` changes how DATA is read, not the new bundle. Raises UsageError for an invalid value.
    """

    scheme: Scheme = option("int8", "int8, int8-weights or int4-weights.")
    method: Method = option("mse", "How ranges are found: mse, minmax or percentile.")
    samples: int = option(128, "Calibrate on this many samples, evenly spread over the data.")
    smooth: bool = option(True, "Fold SmoothQuant into LayerNorms and value projections.")
    correct_bias: bool = option(True, "Correct the mean error of products in their biases.")
    weight_bits: int | None = option(None, "8, or 7 for x86 CPUs without VNNI. The default suits this machine.")
    precision: Mapping[str, Scheme] = option(dict, "Another scheme for some layers: a name or pattern.", "NAME=SCHEME")
    keep_float: Sequence[str] = option(tuple, "Layers that stay float: names, or patterns (decoder.*).", "NAME")
    min_coverage: float = option(100.0, "Smallest share of int8 multiply-adds in integer kernels, in percent.")
    gates: Gates = Gates()
    truncate: bool = option(False, "Cut texts that are too long for the model instead of skipping them.")
    overwrite: bool = option(False, "Replace an existing bundle.")
    threads: int | None = option(None, "Threads of the engine; by default the engine chooses.")

    def __post_init__(self) -> None:
        from perceiver_export.runtimes.opening import check_threads

        check_choice("scheme", self.scheme, tuple(one for one in get_args(Scheme) if one != "float"))
        check_choice("method", self.method, get_args(Method))
        check_whole("samples", self.samples, 1, None, "give 1 or more; 128 is enough for most models")
        if self.weight_bits not in (None, 7, 8):
            raise UsageError(f"weight_bits is {self.weight_bits!r}", "give 7 or 8; for 4 bits use scheme int4-weights")
        check_kind("precision", self.precision, Mapping, "a scheme by pattern of layer names")
        if isinstance(self.keep_float, str) or not isinstance(self.keep_float, Sequence):
            raise UsageError(f"keep_float is {self.keep_float!r}", "give a list of patterns of layer names")
        for pattern, scheme in self.schemes.items():
            check_kind("a pattern of layer names", pattern, str, "text such as encoder.*.mlp.*")
            check_choice("scheme", scheme, get_args(Scheme))
        check_kind("gates", self.gates, Gates, "Gates(max_drop=…, …)")
        check_percent("--min-coverage", self.min_coverage)
        check_threads(self.threads)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each pattern of layer names, including layers that stay float."""
        return {**self.precision, **dict.fromkeys(self.keep_float, "float")}

    @property
    def bits(self) -> int:
        """Bits of weights that are multiplied as integers: as requested, or as this machine needs."""
        from perceiver_export.runtimes.machine import saturates

        return self.weight_bits or (7 if saturates() else 8)
