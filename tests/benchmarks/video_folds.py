# SPDX-License-Identifier: Apache-2.0
"""Video autoencoding: the folded bundle decodes all 804,737 queries of a clip; the original encodes for each chunk.

    python -m tests.benchmarks.video_folds [--rounds 3] [--threads 2]

The original decodes a clip in 128 chunks and encodes it again for each. Its time here is that of two such chunks (our
unfolded graphs on ONNX Runtime, encoder and 6,272 video queries), times 64. Sound and label are left out in its favor.
The rows of three chunks must agree within 1e-4 of their scale. Fresh processes take turns; memory is the largest
resident size of the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from tests.benchmarks.harness import Row, command, fresh, in_turn, medians, seconds
from tests.benchmarks.sides import golden_inputs, save_feeds

AGREE = 1e-4
CHUNKS = 128
_QUERIES = 16 * 224 * 224 // CHUNKS
_COMPARED = 3  # chunks


def measure(work: Path, rounds: int = 3, threads: int = 2) -> Iterator[Row]:
    from perceiver_export.exporter import ExportOptions, export

    folded, plain = work / "video-folded", work / "video-plain"
    if not folded.exists():
        export("preset:video-autoencoding", folded)
    if not plain.exists():
        options = ExportOptions(fold=False, split=True, shape={"queries": (_QUERIES,)})
        export("preset:video-autoencoding", plain, options)
    clip = save_feeds(work, "clip", golden_inputs(folded))
    sides = {
        "folded": partial(fresh, run_folded, folded, clip, work / "folded.npy", threads),
        "plain": partial(fresh, run_plain, plain, clip, work / "plain.npy", threads),
    }
    found = in_turn(sides, rounds)
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(found["plain"], found["folded"], strict=True)]
    ours, theirs = (np.load(work / f"{side}.npy") for side in sides)
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    yield {
        **medians(found),
        "plain over folded": float(np.median(ratios)),
        "largest difference": difference,
        "held": difference <= AGREE,
    }


def run_folded(bundle: str, clip: str, rows: str, threads: int) -> Row:
    """Seconds of a clip, the better of two."""
    from perceiver_export.runtimes import load
    from perceiver_export.runtimes.machine import peak_memory

    runtime, feeds = load(bundle, "ort-cpu", threads=threads), dict(np.load(clip))
    best = min(seconds(lambda: runtime.run(feeds)) for _ in range(2))
    np.save(rows, runtime.run(feeds)["video"].reshape(1, -1, 3)[:, : _COMPARED * _QUERIES])
    return {"seconds": best, "MiB": peak_memory()}


def run_plain(bundle: str, clip: str, rows: str, threads: int) -> Row:
    """Seconds of a clip, from two chunks after one that warms up."""
    from perceiver_export.runtimes import load
    from perceiver_export.runtimes.machine import peak_memory

    encoder, decoder = (load(bundle, "ort-cpu", part=part, threads=threads) for part in ("encoder", "decoder_video"))
    given, decoded = dict(np.load(clip)), []

    def decode(chunk: int) -> None:
        queries = np.arange(chunk * _QUERIES, (chunk + 1) * _QUERIES, dtype=np.int32)[None]
        decoded.append(decoder.run({**encoder.run(given), "queries": queries})["video"])

    times = [seconds(partial(decode, chunk)) for chunk in range(_COMPARED)]
    np.save(rows, np.concatenate(decoded, axis=1))
    return {"seconds": sum(times[1:]) * CHUNKS / (_COMPARED - 1), "MiB": peak_memory()}


if __name__ == "__main__":
    command(measure)
