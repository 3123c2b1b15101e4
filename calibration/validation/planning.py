# SPDX-License-Identifier: Apache-2.0
"""How many samples a gate needs, before any data is collected, from the exact distribution of outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from perceiver_export.calibration.validation.gates import AT_LEAST, AT_MOST
from perceiver_export.calibration.validation.options import Gates
from perceiver_export.calibration.validation.statistics import CONFIDENCE, p_value, scipy_stats, share
from perceiver_export.runtimes.errors import UsageError

POWERS = (0.8, 0.9, 0.95)
_SCALES = (0.5, 1.0, 2.0)  # of the requested margin
_MOST = 1_000_000
_STEP, _CLOSE = 1.2, 0.02  # of the search for a number of samples
_NEGLIGIBLE = 1e-7


class Plan(msgspec.Struct, frozen=True):
    """The samples needed for a gate to hold with a probability of 0.8, 0.9 and 0.95; None if over a million or never.

    ``flips``: the share of answers that differ from the reference's, in percent. The candidate is right in as many of
    them as the reference, so the true drop is 0.
    """

    option: str
    sense: str
    limit: float
    flips: float
    samples: tuple[int | None, ...]

    @property
    def possible(self) -> bool:
        """Whether any number of samples is enough."""
        return self.limit > 0 if self.sense == AT_MOST else 100 - self.limit > self.flips


def plan(gates: Gates, flips: float = 1.0) -> tuple[Plan, ...]:
    """Samples needed for each gate's limit, and for half and twice its distance from 0 or 100 %. Raises UsageError."""
    if not 0 <= flips <= 100:
        raise UsageError(f"--flips is {flips:g}", "give the percentage of answers that may differ, such as 1%")
    if gates.change is not None or (gates.max_drop, gates.min_agreement) == (None, None):
        raise UsageError("--plan needs a gate whose bounds are exact", "give --max-drop or --min-agreement")
    found = []
    for scale in _SCALES:
        if gates.max_drop is not None and (scale == 1 or 0 < scale * gates.max_drop < 100):
            limit = scale * gates.max_drop
            found.append(Plan("--max-drop", AT_MOST, limit, flips, _samples(_of_drop, limit / 100, flips / 100)))
        if gates.min_agreement is not None and (scale == 1 or 0 < scale * (100 - gates.min_agreement) < 100):
            room = scale * (100 - gates.min_agreement)
            asked = ("--min-agreement", AT_LEAST, 100 - room)
            found.append(Plan(*asked, flips, _samples(_of_agreement, room / 100, flips / 100)))
    return tuple(found)


def _samples(power: Callable[[int, float, float], float], margin: float, flips: float) -> tuple[int | None, ...]:
    """For each of `POWERS`, a number of samples that reaches it, within 2 % of the least such number."""
    if not 0 < margin < 1 or (power is _of_agreement and flips >= margin):
        return (None,) * len(POWERS)
    distance = margin - flips if power is _of_agreement else margin
    found: list[int | None] = []
    for wanted in POWERS:
        quantiles = scipy_stats().norm.ppf([CONFIDENCE, wanted]).sum()
        first = max(quantiles**2 * flips / distance**2, -math.log(1 - CONFIDENCE) / margin)  # by a normal approximation
        high = math.ceil(first)
        while high < _MOST and power(high, margin, flips) < wanted:
            high = math.ceil(_STEP * high)
        low = int(high / _STEP)
        while low > 1 and power(low, margin, flips) >= wanted:
            high, low = low, int(low / _STEP)
        while high - low > max(1, _CLOSE * high):
            middle = (low + high) // 2
            low, high = (low, middle) if power(middle, margin, flips) >= wanted else (middle, high)
        found.append(high if high < _MOST else None)
    return tuple(found)


def _of_drop(samples: int, margin: float, flips: float) -> float:
    return power_of_drop(samples, flips / 2, flips / 2, margin)


def power_of_drop(samples: int, p_lost: float, p_gained: float, margin: float) -> float:
    """Chance that the bound of the drop is within the margin, all as shares; ignores outcomes rarer than 1e-7.

    The p-value rises with the number of losses and falls with that of gains.
    """
    binom = scipy_stats().binom
    (least, first), (most, last) = (
        [int(of(_NEGLIGIBLE, samples, share)) for share in (p_lost, p_gained)] for of in (binom.ppf, binom.isf)
    )
    chance, gained = 0.0, max(first, 0)
    for lost in range(max(least, 0), most + 1):
        while gained <= min(last, samples - lost) and p_value(lost, gained, samples, margin) > 1 - CONFIDENCE:
            gained += 1
        if gained > min(last, samples - lost):
            break
        given = p_gained / (1 - p_lost) if p_lost < 1 else 0.0
        chance += float(binom.pmf(lost, samples, p_lost) * binom.sf(gained - 1, samples - lost, given))
    return chance


def _of_agreement(samples: int, room: float, flips: float) -> float:
    """Chance that the bound of the agreement is within ``room`` of 1, as a share."""
    low, high = -1, samples  # numbers of answers that differ: the first passes, the second does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(samples - middle, samples).lower >= 1 - room else (low, middle)
    return float(scipy_stats().binom.cdf(low, samples, flips))
