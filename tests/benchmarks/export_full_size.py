# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of exporting an architecture at full size (random weights), compared with torch.onnx.

    python -m tests.benchmarks.export_full_size [PRESET…]

Each side runs in a fresh process, timed from the loaded model on. Ours is measured up to the graph on disk, and again
with the verification against torch, which torch.onnx does not have. torch.onnx exports transformers' model, if there is
one. Limits: no slower than torch.onnx, and at most 0.7 GB plus four times the weights in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.harness import Row, command, fresh


def measure(work: Path, presets: tuple[str, ...] = ("imagenet-fourier",)) -> Iterator[Row]:
    for preset in presets:
        ours = fresh(export_ours, preset, work / preset)
        plain = fresh(export_plain, preset, work / preset, work / f"{preset}-plain" / "model.onnx")
        memory, fast = ours["MiB"] <= ours["MiB allowed"], plain is None or ours["seconds"] <= plain["seconds"]
        yield {"preset": preset, **ours, "torch.onnx": plain, "held": memory and fast}


def export_ours(preset: str, out: str) -> Row:
    """Seconds and MiB, of the graph and of the whole export."""
    from perceiver_export.exporter import export, load_model
    from perceiver_export.runtimes.machine import peak_memory

    loaded = load_model(f"preset:{preset}")
    start, written = time.perf_counter(), Row()

    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("verify ") and not written:
            written.update({"seconds": time.perf_counter() - start, "MiB": peak_memory()})

    bundle = export(loaded, out, progress=progress)
    weights = bundle.manifest.files["model.weights"].size / 2**20
    return {
        **written,
        "MiB allowed": 0.7e9 / 2**20 + 4 * weights,
        "seconds with verification": time.perf_counter() - start,
        "MiB with verification": peak_memory(),
        "largest difference from torch": max(one.difference for one in bundle.manifest.verification),
    }


def export_plain(preset: str, bundle: str, out: str) -> Row | None:
    """The same for torch.onnx; None if transformers lacks the model."""
    from perceiver_export.runtimes.machine import peak_memory
    from tests.benchmarks.plain_models import plain_export, transformers_model
    from tests.benchmarks.sides import golden_inputs

    feeds, model = golden_inputs(Path(bundle)), transformers_model(preset)
    if model is None:
        return None
    start = time.perf_counter()
    plain_export(preset, model, feeds, Path(out))
    return {"seconds": time.perf_counter() - start, "MiB": peak_memory()}


if __name__ == "__main__":
    command(measure)
