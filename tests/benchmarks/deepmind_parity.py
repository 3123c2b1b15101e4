# SPDX-License-Identifier: Apache-2.0
"""The README's table: largest difference of our torch models from what DeepMind's code computed, in float32.

python tests/benchmarks/deepmind_parity.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.exporter.deepmind_reference import Array, arrays, model_folders, tolerance
from tests.exporter.deepmind_runs import computed


def rows(folder: Path) -> list[tuple[str, float, float]]:
    """(value, largest difference, tolerance) of every output, then of the inner value that comes nearest to its own."""
    found, expected = computed(folder), arrays(folder)
    floats = [key for key, value in expected.items() if not key.startswith("in/") and value.dtype.kind == "f"]
    compared = {key: (_difference(found[key], expected[key]), tolerance(folder, key)) for key in floats}
    # Chunks of a video are parts of its outputs.
    outputs = [key for key in floats if key.startswith("out/") and not key.startswith("out/chunk")]
    inner = max((key for key in floats if key.startswith("mid/")), key=lambda key: compared[key][0] / compared[key][1])
    return [(key.partition("/")[2], *compared[key]) for key in outputs] + [(f"inside: {inner[4:]}", *compared[inner])]


def _difference(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


def main() -> None:
    print("| model | value | largest difference | tolerance |\n|---|---|---|---|")
    for folder in model_folders():
        for value, difference, allowed in rows(folder):
            print(f"| {folder.name} | {value} | {difference:.1e} | {allowed:.1e} |")


if __name__ == "__main__":
    main()
