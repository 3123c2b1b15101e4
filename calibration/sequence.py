# SPDX-License-Identifier: Apache-2.0
"""Which rungs of a ladder are worth a try, and the fixed sequence in which they are certified. Rungs count upwards from
the cheapest and riskiest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


def climb(count: int, holds: Callable[[int], bool], worth: Callable[[int, int], bool]) -> None:
    """Ask ``holds`` of as few of ``count`` rungs as find the lowest that holds: 0, 1, 2, 4, … up to the first, one more
    above it as a safer candidate, then halves of what lies between it and the last that did not.

    Halving ends where the lower rung is not ``worth`` it against the upper one. Samples tell whether a rung holds, so a
    lower one may hold by chance: certification is what finds out.
    """
    failed, index = -1, 0
    while not holds(index):
        if index == count - 1:
            return
        failed, index = index, min(max(1, 2 * index), count - 1)
    safer = min(max(1, 2 * index), count - 1)
    if safer > index:
        holds(safer)
    while index - failed > 1 and worth(failed, index):
        middle = (failed + index) // 2
        failed, index = (failed, middle) if holds(middle) else (middle, index)


def fixed_order(costs: Mapping[int, float], held: Mapping[int, bool], least_gain: float) -> list[int]:
    """The order of certification: the rungs that held on the search split, safest (highest) first, cheaper ones after.

    A rung that costs no less than ``1 − least_gain`` of a safer one is never worth a test.
    """
    order: list[int] = []
    for index in sorted(costs, reverse=True):
        if held[index] and (not order or gains(costs[index], costs[order[-1]], least_gain)):
            order.append(index)
    return order


def gains(cost: float, safer: float, least_gain: float) -> bool:
    """Whether a riskier rung's cost is lower than a safer one's by at least ``least_gain``, a share."""
    return cost <= (1 - least_gain) * safer and cost < safer


def fixed_sequence(order: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """Test one after the other, each at the full level, up to the first that fails; the last that held, or None."""
    kept = None
    for index in order:
        if not holds(index):
            break
        kept = index
    return kept
