# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of exporting an architecture at full size (random weights), beside torch.onnx.

    python tests/benchmarks/export_full_size.py [PRESET…] [--json FILE]

Each side in a fresh process, timed from the loaded model on. Ours is measured up to the graph that lies on disk, and
once more with its verification against torch, which torch.onnx does not have. The peer exports transformers' model as
it is, where there is one. A table says in the end whether the limits held: no slower than torch.onnx, and at most
0.7 GB and four times the weights in memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def ours(preset: str, out: Path) -> dict[str, float]:
    """In this process: seconds and MiB, of the graph and of all."""
    from perceiver_export.exporter import export, load_model
    from perceiver_export.runtimes.fresh_process import peak_memory

    loaded = load_model(f"preset:{preset}")
    start = time.perf_counter()
    written: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what == "verify" and not written:
            written.update(seconds=time.perf_counter() - start, peak=peak_memory())

    bundle = export(loaded, out, progress=progress)
    weights = bundle.manifest.files["model.weights"].size / 2**20
    return {
        "seconds": written["seconds"],
        "peak MiB": written["peak"],
        "allowed MiB": 0.7e9 / 2**20 + 4 * weights,
        "seconds with verification": time.perf_counter() - start,
        "peak MiB with verification": peak_memory(),
        "weights MiB": weights,
        "largest difference from torch": max(one.difference for one in bundle.manifest.verification),
    }


def plain(preset: str, out: Path) -> dict[str, float] | None:
    """In this process: the same of torch.onnx."""
    import numpy as np

    from perceiver_export.runtimes.bundle import open_bundle
    from perceiver_export.runtimes.fresh_process import peak_memory
    from tests.benchmarks.folds import golden
    from tests.benchmarks.plain_models import plain_export, transformers_model

    feeds = {name: np.array(array) for name, array in golden(open_bundle(out / "ours").path).items()}
    model = transformers_model(preset)
    if model is None:
        return None
    start = time.perf_counter()
    plain_export(preset, model, feeds, out / "plain" / "model.onnx")
    return {"seconds": time.perf_counter() - start, "peak MiB": peak_memory()}


def held(found: dict[str, dict[str, float] | None]) -> list[tuple[str, str, str, str]]:
    """A row a limit: what, measured, allowed, whether it held. Without a peer nothing limits the time."""
    ours, plain = found["ours"], found["plain"]
    assert ours is not None
    limits = [("memory, MiB", ours["peak MiB"], ours["allowed MiB"])]
    if plain is not None:
        limits.append(("time, s", ours["seconds"], plain["seconds"]))
    return [(name, f"{got:,.1f}", f"{most:,.1f}", "yes" if got <= most else "NO") for name, got, most in limits]


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        side, preset, out = sys.argv[2:]
        print(json.dumps(ours(preset, Path(out) / "ours") if side == "ours" else plain(preset, Path(out))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["imagenet-fourier"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for preset in arguments.presets:
        with tempfile.TemporaryDirectory() as directory:
            results[preset] = {}
            for side in ("ours", "plain"):
                command = [sys.executable, __file__, "--side", side, preset, directory]
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                results[preset][side] = json.loads(done.stdout.splitlines()[-1])
        print(preset, json.dumps(results[preset], indent=1), flush=True)
    print(f"\n{'preset':<24}{'graph on disk':<16}{'measured':>12}{'at most':>12}{'held':>6}")
    for preset, found in results.items():
        for name, got, most, answer in held(found):
            print(f"{preset:<24}{name:<16}{got:>12}{most:>12}{answer:>6}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
