# SPDX-License-Identifier: Apache-2.0
"""How much memory activations may take."""

from __future__ import annotations

import re

from perceiver_export.runtimes.errors import UsageError

DEFAULT_BUDGET = "512MiB"


def parse_budget(text: str | int) -> int:
    """Bytes; ``"512MiB"``, ``"1.5GB"``. Raises UsageError."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?)?B?\s*", text, re.IGNORECASE)
    if found is None:
        raise UsageError(f"--memory-budget {text!r} is no size", "for example 512MiB or 1.5GB")
    number, unit = found.groups()
    factors = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
    return int(float(number) * factors[(unit or "").lower()])


def budget_text(size: int) -> str:
    """Bytes as ``512 MiB``; of less than one MiB as KiB, or as bytes."""
    for power, unit in ((20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):,.1f} {unit}".replace(".0 ", " ")
    return f"{size} bytes"
