# SPDX-License-Identifier: Apache-2.0
"""Start-up cost: the runtime's import against numpy's, and `--help` against Python's own start.

    python -m tests.benchmarks.imports [--runs 15]

The figures are medians over fresh processes that take turns.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.benchmarks.harness import Row, command, medians, seconds_in_turn

PYTHON, NUMPY, RUNTIMES, HELP = "python", "import numpy", "import perceiver_export.runtimes", "perceiver-export --help"
COMMANDS = {
    PYTHON: [sys.executable, "-c", "pass"],
    NUMPY: [sys.executable, "-c", NUMPY],
    RUNTIMES: [sys.executable, "-c", RUNTIMES],
    "import load": [sys.executable, "-c", "from perceiver_export.runtimes import load"],
    "import all that load uses": [sys.executable, "-c", "import perceiver_export.runtimes.opening"],
    HELP: [str(Path(sys.executable).with_name("perceiver-export")), "--help"],
}


def measure(work: Path, runs: int = 15) -> Iterator[Row]:
    calls = {name: partial(subprocess.run, given, check=True, capture_output=True) for name, given in COMMANDS.items()}
    found = medians(seconds_in_turn(calls, runs))
    for name, median in found.items():
        yield {
            "command": name,
            "ms": 1e3 * median,
            "ms beyond Python's start": 1e3 * (median - found[PYTHON]),
            "over import numpy": median / found[NUMPY],
            "the same beyond Python's start": (median - found[PYTHON]) / (found[NUMPY] - found[PYTHON]),
        }


if __name__ == "__main__":
    command(measure)
