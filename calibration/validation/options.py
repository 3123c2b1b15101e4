# SPDX-License-Identifier: Apache-2.0
"""Gates and options of `validate`, checked on construction; the command line derives its own options from them."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from perceiver_export.calibration.options import option
from perceiver_export.runtimes.bundle import BundleLike
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.errors import UsageError, check_kind, check_whole
from perceiver_export.runtimes.runtime import Array, Feeds

# A reference that is not a bundle: preprocessed inputs (n, ...) by name -> outputs (n, ...) by name. It may have a
# ``name``, and ``described`` in the form of `Side.described`; without that, nothing can be certified against it.
Reference = Callable[[Feeds], Mapping[str, Array]]


MOST_SHARDS = 100_000


@dataclass(frozen=True)
class Gates:
    """Limits on a candidate's distance from its reference, each on a 95 % bound. Construction raises UsageError."""

    max_drop: float | None = option(None, "Gate: largest loss of accuracy, in percentage points (95 % upper bound).")
    min_agreement: float | None = option(None, "Gate: least agreement with the reference, in % (95 % lower bound).")
    max_metric_change: float | str | None = option(
        None, "Gate: most that --metric may worsen, in its unit or relative, as 2% (95 % upper bound)."
    )
    metric: str | None = option(None, "One of the task's metrics, or module:function; by default the task's first.")

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_kind("--metric", self.metric, str, "the name of a metric, or module:function")
        if self.min_agreement is not None:
            check_percent("--min-agreement", self.min_agreement)
        if self.min_agreement == 0:
            raise UsageError("--min-agreement is 0, which every candidate passes", "give a percentage above 1")
        if self.max_drop is not None:
            check_kind("--max-drop", self.max_drop, numbers.Real, "points, 0 or more")
        for name, value, below in (("drop", self.max_drop, 100), ("metric-change", self.change, math.inf)):
            if value is not None and not 0 <= value < below:
                raise UsageError(f"--max-{name} is {value:g}", f"give 0 or more, below {below:g}")

    @property
    def any(self) -> bool:
        """Whether any gate is set."""
        return (self.max_drop, self.min_agreement, self.max_metric_change) != (None, None, None)

    @property
    def relative(self) -> bool:
        """Whether ``max_metric_change`` is relative to the reference."""
        return str(self.max_metric_change).strip().endswith("%")

    @property
    def change(self) -> float | None:
        """``max_metric_change`` as a number: in the metric's unit, or as a share. Raises UsageError."""
        if self.max_metric_change is None:
            return None
        text = str(self.max_metric_change).strip()
        try:
            return float(text.rstrip("%")) / (100 if self.relative else 1)
        except ValueError as error:
            raise UsageError(f"--max-metric-change is {text!r}", "give a number, or a share as 2%") from error

    @property
    def own(self) -> str | None:
        """``module:function`` of your own metric."""
        return self.metric if self.metric is not None and ":" in self.metric else None


def check_percent(option: str, value: float, below: float = 1.0) -> None:
    """Raise UsageError unless ``value`` is a percentage; one above 0 and at most ``below`` looks like a share."""
    check_kind(option, value, numbers.Real, "a percentage, from 0 to 100")
    if not 0 <= value <= 100:
        raise UsageError(f"{option} is {value:g}", "give a percentage, from 0 to 100")
    if 0 < value <= below:
        raise UsageError(f"{option} is {value:g}, but it is in percent", f"did you mean {100 * value:g}?")


def parse_shard(text: str) -> tuple[int, int]:
    """3/16 → (3, 16). Raises UsageError."""
    try:
        shard, shards = map(int, text.split("/"))
    except ValueError:  # also for thousands of digits
        shard, shards = 0, 0
    check_shard((shard, shards), text)
    return shard, shards


def check_shard(shard: tuple[int, int], text: str | None = None) -> None:
    """Raise UsageError unless it is shard i of n, from 1."""
    if not 1 <= shard[0] <= shard[1] <= MOST_SHARDS:
        raise UsageError(f"--shard is {(text or '{}/{}'.format(*shard))[:40]!r}", "give 1/16 to 16/16 for 16 shards")


@dataclass(frozen=True)
class ValidateOptions:
    """Options of `validate`; `validate --help` prints the doc of each field that has one.

    Construction raises UsageError.
    ``against`` is a bundle or a function from inputs to outputs by name. ``device`` may be ``all`` for
    `validate_targets`. ``certify`` raises before anything runs if no certificate can rest on the reference or be
    written. Without ``allow_overlap`` it also raises for samples that are repeated, or that the bundle was calibrated
    on; otherwise the result only warns of them. The command writes the certificate; Python code calls `certify`.
    ``keep_failures``: return a result with a `Failure` if outputs are NaN. ``worst``: how many of the worst samples to
    list.
    """

    against: BundleLike | Reference | None = option(
        None, "Reference: another bundle, or the checkpoint in PyTorch.", "BUNDLE|SOURCE"
    )
    gates: Gates = Gates()
    against_device: str | None = option(
        None, "Target of the reference, by default the same. Without --against, BUNDLE on this target is the reference."
    )
    samples: int | None = option(None, "Use this many samples, evenly spread over the data.")
    device: str = option("auto", "Target. `auto` prefers a certified one; `all` takes each.")
    precision: Precision | None = option(
        None, "Engine of this precision (fp32, fp16, bf16); by default the one built last."
    )
    threads: int | None = option(None, "Threads of the engines; by default the engines choose.")
    truncate: bool = option(False, "Cut texts that are too long for the model instead of leaving them out.")
    certify: bool = option(
        False, "Write a certificate into BUNDLE if all gates hold. It is shown only on machines for which it is valid."
    )
    allow_overlap: bool = option(False, "Certify even if samples are repeated or were used for calibration.")
    sequential: bool = option(False, "Stop as soon as the gates are decided; the bounds hold wherever it stops.")
    seed: int = option(0, "With --sequential: the seed of the random order of samples.")
    save_worst: str | os.PathLike[str] | None = option(
        None, "Save the worst samples and classes here (images, inputs, worst.json).", "DIR"
    )
    worst: int = 12
    keep_failures: bool = False

    def __post_init__(self) -> None:
        check_kind("gates", self.gates, Gates, "Gates(max_drop=…, …)")
        if self.samples is not None:
            check_whole("samples", self.samples, 1, None, "give 1 or more, or leave it out")
        check_whole("seed", self.seed, 0, None, "give 0 or more")
        if self.sequential and not self.gates.any:
            raise UsageError("--sequential has no gate to decide", "give --max-drop or --min-agreement")
        if callable(self.against) and self.against_device is not None:
            raise UsageError("a checkpoint runs in torch, not on a target", "leave --against-device out")
        if self.certify and not self.gates.any:
            raise UsageError("a certificate needs a gate", "give --max-drop or --min-agreement")
