# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a calibration pass over that of plain inference, by number of samples.

    python tests/benchmarks/calibration_memory.py [--bundle BUNDLE] [--samples 32 128 512] [--json FILE]

Each in a process of its own; plain inference loads the same libraries and runs samples on ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PLAIN = """
import sys, itertools
import numpy as np, onnx_ir
from perceiver_export.calibration.feeds import open_feeds
from perceiver_export.calibration.parts import run_parts, stack
from perceiver_export.calibration.effects import ort_runner
from perceiver_export.runtimes import open_bundle
bundle = open_bundle(sys.argv[1])
runners = {name: ort_runner(bundle.file(part.file)) for name, part in bundle.manifest.parts.items()}
generator = np.random.default_rng(0)
for example in itertools.islice(open_feeds("random", bundle.manifest).stream, int(sys.argv[2])):
    run_parts(bundle.manifest, runners, stack([example]), generator)
"""
CALIBRATION = """
import sys, itertools
from perceiver_export.calibration.observe import observe
from perceiver_export.calibration.feeds import open_feeds
from perceiver_export.runtimes import open_bundle
bundle, count = open_bundle(sys.argv[1]), int(sys.argv[2])
samples = (one.feeds for one in open_feeds("random", bundle.manifest).stream)
observe(bundle, samples, count, None, lambda *_: None)
"""
PEAK = """
from perceiver_export.runtimes.fresh_process import peak_memory
print(peak_memory())
"""


def peak(code: str, bundle: Path, samples: int) -> float:
    """MiB."""
    command = [sys.executable, "-c", code + PEAK, str(bundle), str(samples)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bundle = arguments.bundle
        if bundle is None:
            from perceiver_export.exporter import export

            example = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist" / "checkpoint"
            bundle = export(example, Path(directory) / "fashion").path
        plain = peak(PLAIN, bundle, min(arguments.samples))
        rows = {count: peak(CALIBRATION, bundle, count) for count in arguments.samples}
    print(f"plain inference: {plain:.0f} MiB")
    for count, found in rows.items():
        print(f"{count:5d} samples: {found:.0f} MiB, {found / plain:.2f} × plain inference")
    result = {"plain MiB": plain, "calibration MiB": rows, "ratio": {n: m / plain for n, m in rows.items()}}
    print(json.dumps(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
