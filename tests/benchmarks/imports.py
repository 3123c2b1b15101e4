# SPDX-License-Identifier: Apache-2.0
"""What starting costs: the runtime's import against numpy's, and `--help` against Python's own start.

    python tests/benchmarks/imports.py [--runs 15]

Fresh processes, in turn; medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import numpy": [sys.executable, "-c", "import numpy"],
    "import perceiver_export.runtimes": [sys.executable, "-c", "import perceiver_export.runtimes"],
    "perceiver-export --help": [str(Path(sys.executable).with_name("perceiver-export")), "--help"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    for command in COMMANDS.values():
        seconds(command)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:34s} {median * 1e3:7.0f} ms")
    start, ours, theirs = medians["python"], medians["import perceiver_export.runtimes"], medians["import numpy"]
    print(
        f"import perceiver_export.runtimes takes {ours / theirs:.2f} × import numpy as whole commands, "
        f"{(ours - start) / (theirs - start):.2f} × with Python's own start taken off both"
    )
    print(f"--help takes {medians['perceiver-export --help'] - start:.2f} s beyond Python's own start")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
