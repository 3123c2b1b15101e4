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

RELATIVE = "% of the reference's"  # unit of a limit that was given as 2%
CAVEAT = "by bootstrap, which is too narrow where samples are few and skewed"  # tests/benchmarks/bound_coverage.py
_POWER = 0.8
_MOST = 10**9  # samples that nobody has


class Wanted(msgspec.Struct, frozen=True):
    """What is asked: ``limit`` in ``unit``, of a ``subject`` (a drop, an agreement), by a command line's ``option``."""

    option: str
    subject: str
    what: str
    limit: float
    unit: str

    @property
    def typed(self) -> str:
        """The option with its limit, as it was typed."""
        return f"{self.option} {_number(self.limit)}{'%' if self.unit == RELATIVE else ''}"


class Gate(msgspec.Struct, frozen=True):
    """One thing that was asked for, and what came of it: ``measured``, ``lower`` and ``upper`` in its unit.

    ``samples_to_decide``: how many would decide four times in five, if the truth is what was measured; None where it
    is decided, or where no number would. ``bounds`` are exact, or those of a mean, with its `CAVEAT`.
    ``reservations``: what makes it say less than it seems to (samples that are repeated, a reference that guesses); a
    gate that holds is never shown without them.
    """

    wanted: Wanted
    measured: float
    lower: float
    upper: float
    outcome: Literal["held", "not held", "undecided"]
    samples: int
    samples_to_decide: int | None = None
    reservations: tuple[str, ...] = ()
    bounds: Literal["exact", "bootstrap"] = "exact"

    @property
    def held(self) -> bool:
        """Whether it may pass. Undecided may not."""
        return self.outcome == "held"

    def __str__(self) -> str:
        how = " by bootstrap" if self.bounds == "bootstrap" else ""
        bounds = f"measured {_number(self.measured)}, 95 % bounds{how} {_number(self.lower)} and {_number(self.upper)}"
        unit = f" {self.wanted.unit}" if self.wanted.unit else ""
        but = "".join(f"; but {reservation}" for reservation in self.reservations) if self.held else ""
        return f"{self.outcome}: {self.wanted.typed}: {self.wanted.what} ({bounds}{unit}){but}"


def at_most(wanted: Wanted, found: Estimate, samples: int, spread: float, room: float = 0.0) -> Gate:
    """A gate on a worsening: the upper bound must not exceed the limit.

    ``spread`` is the standard deviation of one sample; ``room`` the limit as a share of samples, where it is one.
    """
    outcome: Literal["held", "not held", "undecided"] = "undecided"
    if found.upper <= wanted.limit:
        outcome = "held"
    elif found.lower > wanted.limit:
        outcome = "not held"
    needed = None
    if outcome == "undecided":
        needed = _needed(wanted.limit - found.value, spread, room, 1 - CONFIDENCE - OUTSIDE)
    return Gate(wanted, found.value, found.lower, found.upper, outcome, samples, needed)


def at_least(wanted: Wanted, found: Estimate, samples: int) -> Gate:
    """A gate on a share, in percent: its lower bound must reach the limit. ``found`` is a share."""
    outcome: Literal["held", "not held", "undecided"] = "undecided"
    value, lower, upper = (100 * bound for bound in (found.value, found.lower, found.upper))
    if lower >= wanted.limit:
        outcome = "held"
    elif upper < wanted.limit:
        outcome = "not held"
    deviation = math.sqrt(max(found.value * (1 - found.value), 0.0))
    missing = 1 - wanted.limit / 100
    needed = _needed(found.value - 1 + missing, deviation, missing) if outcome == "undecided" else None
    return Gate(wanted, value, lower, upper, outcome, samples, needed)


def mean_at_most(wanted: Wanted, found: Estimate, samples: int) -> Gate:
    """A gate on the worsening of a mean. Fewer than 30 samples leave it undecided, whatever resampling says, and so do
    samples that are all alike: of what was not drawn, resampling then says nothing.
    """
    if samples < LEAST_FOR_BOOTSTRAP or found.lower == found.upper:
        needed = LEAST_FOR_BOOTSTRAP if samples < LEAST_FOR_BOOTSTRAP else None
        return Gate(wanted, found.value, found.lower, found.upper, "undecided", samples, needed, bounds="bootstrap")
    # The distance of the bound that the limit is in says how the mean scatters, and so how one sample does.
    z = float(scipy_stats().norm.ppf(CONFIDENCE))
    distance = found.upper - found.value if found.value < wanted.limit else found.value - found.lower
    spread = distance / z * math.sqrt(samples)
    return msgspec.structs.replace(at_most(wanted, found, samples, spread), bounds="bootstrap")


def require(gates: tuple[Gate, ...]) -> None:
    """Raise GateError where a gate does not hold, else UndecidedError where one is undecided; all of them are named."""
    failed = [gate for gate in gates if gate.outcome == "not held"]
    undecided = [gate for gate in gates if gate.outcome == "undecided"]
    said = [*map(str, failed), *(f"{gate}: {gate.samples:,} samples cannot tell" for gate in undecided)]
    if said:
        kind = GateError if failed else UndecidedError
        raise kind("; ".join(said), advice((failed or undecided)[0]))


def advice(gate: Gate) -> str:
    """What to do about a gate that did not hold."""
    if gate.outcome == "not held":
        return "the candidate is not as close to its reference as was asked: do not ship it, or ask for less"
    if gate.samples_to_decide is None:
        if gate.lower == gate.upper:
            return "no sample differs from another, so there are no bounds: give other samples, or gate on a share"
        return "what was measured lies on the margin itself, so no number of samples decides: ask for more, or for less"
    return (
        f"not a pass: about {gate.samples_to_decide:,} samples would decide, if the truth is what was measured;"
        " take fresh ones, for adding to these until the gate holds voids the 95 %"
    )


def _needed(distance: float, spread: float, room: float, error: float = 1 - CONFIDENCE) -> int | None:
    """Samples for a one-sided test at ``distance`` from the margin; ``room`` is what a sample without flips must rule
    out: (1 − room)^n ≤ ``error``.
    """
    z = float(scipy_stats().norm.ppf(CONFIDENCE) + scipy_stats().norm.ppf(_POWER))
    if distance == 0 or (distance > 0 and room <= 0 and spread <= 0):
        return None
    by_spread = (z * spread / distance) ** 2
    by_silence = math.log(error) / math.log1p(-room) if distance > 0 and 0 < room < 1 else 0.0
    needed = math.ceil(max(by_spread, by_silence, 1.0))
    return needed if needed < _MOST else None


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}".rstrip("0").rstrip(".")
