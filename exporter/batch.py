# SPDX-License-Identifier: Apache-2.0
"""How many samples one call takes: a number, or a range."""

from __future__ import annotations

from dataclasses import dataclass

from perceiver_export.runtimes.errors import UsageError


@dataclass(frozen=True)
class Batch:
    """Batch size: one number, or from ``least`` to ``most`` with ``typical`` in between."""

    least: int
    typical: int
    most: int

    @classmethod
    def parse(cls, text: str | int) -> Batch:
        """``4`` or ``1:4:16``. Raises UsageError."""
        try:
            numbers = [int(number) for number in str(text).split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            numbers *= 3
        if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            raise UsageError(
                f"batch {text!r} is neither a positive number nor a rising range",
                "give a number, or MIN:OPT:MAX such as 1:4:16",
            )
        return cls(*numbers)

    @property
    def dynamic(self) -> bool:
        return self.least != self.most
