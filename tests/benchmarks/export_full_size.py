# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of exporting the full-size Fourier ImageNet architecture (random weights).

python tests/benchmarks/export_full_size.py [PRESET]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CODE = """
import json, sys, time
from pathlib import Path
from perceiver_export.exporter import export
stages, start = {}, time.perf_counter()
def progress(what, done, total):
    stages.setdefault(what, time.perf_counter() - start)
bundle = export(sys.argv[1], sys.argv[2], progress=progress)
peak = next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - start, "stages begin at": stages, "peak RSS MiB": peak / 1024,
    "weights MiB": bundle.manifest.files["model.weights"].size / 2**20,
    "largest difference from torch": max(c.difference for c in bundle.manifest.verification)}))
"""


def main() -> None:
    preset = sys.argv[1] if len(sys.argv) > 1 else "preset:imagenet-fourier"
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-c", CODE, preset, str(Path(directory) / "bundle")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(preset, re.sub(r"(\d+\.\d{2})\d+", r"\1", done.stdout.strip()))
    json.loads(done.stdout)


if __name__ == "__main__":
    main()
