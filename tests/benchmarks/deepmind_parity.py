# SPDX-License-Identifier: Apache-2.0
"""docs/results/parity.md: largest difference of our torch models from outputs of DeepMind's code, in float32.

python -m tests.benchmarks.deepmind_parity
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.benchmarks.harness import Row, command
from tests.exporter.deepmind_reference import arrays, model_folders, tolerance
from tests.exporter.deepmind_runs import computed


def measure(work: Path) -> Iterator[Row]:
    """A row per output, then one for the intermediate value that comes nearest to its tolerance."""
    for folder in model_folders():
        found, expected = computed(folder), arrays(folder)
        rows = {
            key: {
                "model": folder.name,
                "value": key.partition("/")[2] if key.startswith("out/") else f"inside: {key[4:]}",
                "largest difference": float(np.abs(found[key] - value).max()),
                "tolerance": tolerance(folder, key),
            }
            for key, value in expected.items()
            if not key.startswith(("in/", "out/chunk")) and value.dtype.kind == "f"
        }
        yield from (row for key, row in rows.items() if key.startswith("out/"))
        inner = (row for key, row in rows.items() if key.startswith("mid/"))
        yield max(inner, key=lambda row: row["largest difference"] / row["tolerance"])


if __name__ == "__main__":
    command(measure)
