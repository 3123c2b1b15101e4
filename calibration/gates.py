# SPDX-License-Identifier: Apache-2.0
"""Gates with three outcomes: held, not held, and undecided, which says how many samples would decide.

A gate holds when the samples show, wrong at most one time in twenty, that the truth is within the margin; it does not
hold when they show as surely that it is beyond. Between the two they are too few, and that is never a pass.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from perceiver_export.calibration.drops import OUTSIDE
from perceiver_export.calibration.statistics import CONFIDENCE, LEAST_FOR_BOOTSTRAP, Estimate, scipy_stats
from perceiver_export.runtimes.errors import GateError, UndecidedError

_POWER = 0.8
_MOST = 10**9  # samples that nobody has


class Gate(msgspec.Struct, frozen=True):
    """One thing that was asked for. ``asked``, ``measured``, ``lower`` and ``upper`` are in ``unit``.

    ``samples_to_decide``: how many would decide four times in five, if the truth is what was measured; None where it
    is decided, or where no number would.
    """

    option: str
    what: str
    asked: float
    measured: float
    lower: float
    upper: float
    unit: str
    outcome: Literal["held", "not held", "undecided"]
    samples: int
    samples_to_decide: int | None = None

    @property
    def held(self) -> bool:
        """Whether it may pass. Undecided may not."""
        return self.outcome == "held"

    def __str__(self) -> str:
        bounds = f"measured {_number(self.measured)}, 95 % bounds {_number(self.lower)} and {_number(self.upper)}"
        asked = f"{self.option} {_number(self.asked)}"
        return f"{self.outcome}: {asked}: {self.what} ({bounds}{' ' + self.unit if self.unit else ''})"


def at_most(
    option: str, what: str, asked: float, found: Estimate, unit: str, samples: int, spread: float, room: float = 0.0
) -> Gate:
    """A gate on a worsening: the upper bound must not exceed ``asked``.

    ``spread`` is the standard deviation of one sample; ``room`` the margin as a share of samples, where it is one.
    """
    outcome: Literal["held", "not held", "undecided"] = "undecided"
    if found.upper <= asked:
        outcome = "held"
    elif found.lower > asked:
        outcome = "not held"
    needed = _needed(asked - found.value, spread, room, 1 - CONFIDENCE - OUTSIDE) if outcome == "undecided" else None
    return Gate(option, what, asked, found.value, found.lower, found.upper, unit, outcome, samples, needed)


def at_least(option: str, what: str, asked: float, found: Estimate, unit: str, samples: int, scale: float) -> Gate:
    """A gate on a share, shown times ``scale``: its lower bound must reach ``asked``."""
    outcome: Literal["held", "not held", "undecided"] = "undecided"
    lower, upper = scale * found.lower, scale * found.upper
    if lower >= asked:
        outcome = "held"
    elif upper < asked:
        outcome = "not held"
    deviation = math.sqrt(max(found.value * (1 - found.value), 0.0))
    distance = found.value - asked / scale
    needed = _needed(distance, deviation, 1 - asked / scale) if outcome == "undecided" else None
    return Gate(option, what, asked, scale * found.value, lower, upper, unit, outcome, samples, needed)


def mean_at_most(option: str, what: str, asked: float, found: Estimate, unit: str, samples: int) -> Gate:
    """A gate on the worsening of a mean. Fewer than 30 samples leave it undecided, whatever resampling says."""
    if samples < LEAST_FOR_BOOTSTRAP:
        few = (asked, found.value, found.lower, found.upper)
        return Gate(option, what, *few, unit, "undecided", samples, LEAST_FOR_BOOTSTRAP)
    # The width of the bounds says how the mean scatters, and so how one sample does.
    z = float(scipy_stats().norm.ppf(CONFIDENCE))
    spread = (found.upper - found.lower) / (2 * z) * math.sqrt(samples)
    return at_most(option, what, asked, found, unit, samples, spread)


def require(gates: tuple[Gate, ...]) -> None:
    """Raise GateError for the first gate that does not hold, else UndecidedError for the first undecided one."""
    for gate in gates:
        if gate.outcome == "not held":
            raise GateError(str(gate), advice(gate))
    for gate in gates:
        if gate.outcome == "undecided":
            raise UndecidedError(f"{gate}: {gate.samples:,} samples cannot tell", advice(gate))


def advice(gate: Gate) -> str:
    """What to do about a gate that did not hold."""
    if gate.outcome == "not held":
        return "the candidate is not as close to its reference as was asked: do not ship it, or ask for less"
    if gate.samples_to_decide is None:
        return "what was measured lies on the margin itself, so no number of samples decides: ask for more, or for less"
    return f"not a pass: about {gate.samples_to_decide:,} samples would decide, if the truth is what was measured"


def _needed(distance: float, spread: float, room: float, error: float = 1 - CONFIDENCE) -> int | None:
    """Samples for a one-sided test at ``distance`` from the margin; ``room`` is what a sample without flips must rule
    out: (1 − room)^n ≤ ``error``.
    """
    z = float(scipy_stats().norm.ppf(CONFIDENCE) + scipy_stats().norm.ppf(_POWER))
    if distance == 0 or (distance > 0 and room <= 0):
        return None
    by_spread = (z * spread / distance) ** 2
    by_silence = math.log(error) / math.log1p(-room) if distance > 0 and 0 < room < 1 else 0.0
    needed = math.ceil(max(by_spread, by_silence, 1.0))
    return needed if needed < _MOST else None


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}".rstrip("0").rstrip(".")
