# SPDX-License-Identifier: Apache-2.0
"""Parameters and FLOPs of every preset, and those that its paper states.

    python -m tests.benchmarks.preset_counts

GFLOP are for one sample with all its queries; a multiply-add counts as two.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from perceiver_export.exporter import PRESETS
from tests.benchmarks.harness import Row, command


def measure(work: Path) -> Iterator[Row]:
    for name, preset in PRESETS.items():
        yield {
            "preset": f"`{name}`",
            "paper": preset.reference,
            "parameters, M": scaled(preset.counts.parameters, 1e6),
            "in the paper, M": scaled(preset.parameters, 1e6),
            "GFLOP": scaled(preset.counts.flops, 1e9),
            "in the paper, GFLOP": scaled(preset.flops, 1e9),
            "remark": preset.remark or "–",
        }


def scaled(number: float | None, unit: float) -> str:
    return f"{number / unit:,.1f}" if number else "–"


if __name__ == "__main__":
    command(measure)
