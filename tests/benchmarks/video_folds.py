# SPDX-License-Identifier: Apache-2.0
"""Video autoencoding: all 804,737 queries of a clip decoded by the folded bundle, beside encoding again for each chunk.

    python tests/benchmarks/video_folds.py [--rounds 3] [--threads 2] [--work DIR] [--json FILE]

The original decodes a clip in 128 chunks, each with an encoding of its own. Its time is that of two such chunks (our
unfolded graphs on ONNX Runtime, encoder and 6,272 video queries), times 64; sound and label, decoded beside, are left
out in its favour. The rows of three chunks must agree within 1e-4 of their scale. Fresh processes take turns; memory is
the largest resident size of the process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

AGREE = 1e-4
CHUNKS = 128
_QUERIES = 16 * 224 * 224 // CHUNKS
_COMPARED = 3  # chunks


def run_folded(bundle: Path, clip: Path, rows: Path, threads: int) -> dict[str, float]:
    """In this process: seconds of a clip, the better of two."""
    from perceiver_export.runtimes import load
    from perceiver_export.runtimes.fresh_process import peak_memory

    runtime, feeds = load(bundle, "ort-cpu", threads=threads), dict(np.load(clip))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        outputs = runtime.run(feeds)
        times.append(time.perf_counter() - start)
    np.save(rows, outputs["video"].reshape(1, -1, 3)[:, : _COMPARED * _QUERIES])
    return {"seconds": min(times), "peak MiB": peak_memory()}


def run_plain(bundle: Path, clip: Path, rows: Path, threads: int) -> dict[str, float]:
    """In this process: seconds of a clip, from two chunks after one that warms up."""
    from perceiver_export.runtimes import load
    from perceiver_export.runtimes.fresh_process import peak_memory

    encoder = load(bundle, "ort-cpu", part="encoder", threads=threads)
    decoder = load(bundle, "ort-cpu", part="decoder_video", threads=threads)
    given = dict(np.load(clip))
    times, decoded = [], []
    for chunk in range(_COMPARED):
        queries = np.arange(chunk * _QUERIES, (chunk + 1) * _QUERIES, dtype=np.int32)[None]
        start = time.perf_counter()
        decoded.append(decoder.run({**encoder.run(given), "queries": queries})["video"])
        times.append(time.perf_counter() - start)
    np.save(rows, np.concatenate(decoded, axis=1))
    return {"seconds": sum(times[1:]) * CHUNKS / (_COMPARED - 1), "peak MiB": peak_memory()}


def save_clip(bundle: Path, clip: Path) -> None:
    """The encoder's inputs that the bundle was verified with."""
    with np.load(bundle / "golden.npz") as arrays:
        prefix = "encoder/input/"
        given = {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
    np.savez(clip, allow_pickle=False, **given)


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        kind, bundle, clip, rows, threads = sys.argv[2:]
        run = run_folded if kind == "folded" else run_plain
        print(json.dumps(run(Path(bundle), Path(clip), Path(rows), int(threads))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from perceiver_export.exporter import export

    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        bundles = {kind: work / f"video-{kind}" for kind in ("folded", "plain")}
        if not bundles["folded"].exists():
            export("preset:video-autoencoding", bundles["folded"])
        if not bundles["plain"].exists():
            shape = {"queries": (_QUERIES,)}
            export("preset:video-autoencoding", bundles["plain"], fold=False, split=True, shape=shape)
        save_clip(bundles["folded"], work / "clip.npz")
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in bundles}
        for _ in range(arguments.rounds):
            for kind, made in bundles.items():
                files = [str(made), str(work / "clip.npz"), str(work / f"{kind}.npy")]
                command = [sys.executable, __file__, "--side", kind, *files, str(arguments.threads)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[kind].append(json.loads(done.stdout.splitlines()[-1]))
        folded, plain = (np.load(work / f"{kind}.npy") for kind in ("folded", "plain"))
    result: dict[str, dict[str, float] | float] = {
        kind: {name: float(np.median([one[name] for one in runs])) for name in runs[0]} for kind, runs in found.items()
    }
    pairs = zip(found["plain"], found["folded"], strict=True)
    result["plain over folded"] = float(np.median([one["seconds"] / other["seconds"] for one, other in pairs]))
    difference = float(np.abs(folded - plain).max() / np.abs(plain).max())
    result["largest difference from plain"] = difference
    print(json.dumps(result, indent=1))
    if difference > AGREE:
        raise SystemExit("outputs differ")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
