# SPDX-License-Identifier: Apache-2.0
"""Time and memory of an encoder against the number of its inputs M, folded and plain, on ONNX Runtime.

    python tests/benchmarks/fold_scaling.py [--rounds 3] [--threads 2] [--json FILE] [--figure FILE.svg]

ImageNet's Fourier Perceiver IO with a single self-attention, on pictures of 100² to 632² pixels: what grows with M is
the cross-attention. Both graphs are ours, `--fold` and `--no-fold`, each in fresh processes that take turns. In the end
it says whether the folded encoder's cost grows no faster than linearly, and slower than the plain one's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SIDES = (100, 160, 224, 316, 447, 632)


def measure(work: Path, rounds: int, threads: int) -> list[dict[str, float]]:
    """One row for each size: M, milliseconds and MiB of both graphs."""
    from tests.benchmarks.folds import golden, in_a_process

    rows = []
    for side in SIDES:
        bundles = {kind: work / f"{kind}-{side}" for kind in ("folded", "plain")}
        for kind, bundle in bundles.items():
            export_encoder(side, bundle, fold=kind == "folded")
        np.savez(work / "feeds.npz", allow_pickle=False, **golden(bundles["folded"]))
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in bundles}
        for _ in range(rounds):
            for kind, bundle in bundles.items():
                found[kind].append(in_a_process("folded", bundle, "ort", work / "feeds.npz", work / "out.npy", threads))
        row: dict[str, float] = {"inputs": side * side}
        for kind, runs in found.items():
            row[f"{kind} ms"] = float(np.median([one["ms"] for one in runs]))
            row[f"{kind} MiB"] = float(np.median([one["peak"] for one in runs]))
        rows.append(row)
        print(json.dumps({name: round(value, 1) for name, value in row.items()}), flush=True)
    return rows


def export_encoder(side: int, out: Path, fold: bool) -> None:
    """The model at this size of picture, with one self-attention."""
    import msgspec

    from perceiver_export.exporter import export
    from perceiver_export.exporter.perceiver.model import PerceiverIO
    from perceiver_export.exporter.presets import load_preset

    full = load_preset("imagenet-fourier", "huggingface", (3, side, side))
    encoder = msgspec.structs.replace(full.config.encoder, num_blocks=1, num_self_attentions_per_block=1)
    config = msgspec.structs.replace(full.config, encoder=encoder)
    model = dataclasses.replace(full, model=PerceiverIO(config).eval(), config=config)
    export(model, out, fold=fold)


def slopes(rows: list[dict[str, float]]) -> dict[str, float]:
    """Milliseconds and MiB for each thousand inputs, by least squares."""
    thousands = [row["inputs"] / 1e3 for row in rows]
    names = [name for name in rows[0] if name != "inputs"]
    return {name: float(np.polyfit(thousands, [row[name] for row in rows], 1)[0]) for name in names}


def held(rows: list[dict[str, float]]) -> dict[str, bool]:
    """The limits: an input costs no more among many than among few, and one more costs less than in the plain graph."""
    found, first, last = slopes(rows), rows[0], rows[-1]
    limits = {}
    for unit in ("ms", "MiB"):
        folded, plain = f"folded {unit}", f"plain {unit}"
        limits[f"{unit}: no faster than linearly"] = last[folded] / first[folded] <= last["inputs"] / first["inputs"]
        limits[f"{unit}: slower than plain"] = found[folded] < found[plain]
    return limits


def draw(rows: list[dict[str, float]], figure: Path) -> None:
    """Two panels: time and memory."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "perceiver-export"  # the same numbers, the same file
    from matplotlib import pyplot

    drawn, panels = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for panel, unit, title in zip(panels, ("ms", "MiB"), ("time of a call, ms", "peak memory, MiB"), strict=True):
        for kind, colour in (("plain", "#999999"), ("folded", "#1f6feb")):
            values = [row[f"{kind} {unit}"] for row in rows]
            panel.plot([row["inputs"] / 1e3 for row in rows], values, "o-", color=colour, label=kind)
        panel.set(title=title, xlabel="inputs M, thousands", ylim=(0, None))
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    drawn.savefig(figure, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(Path(temporary), arguments.rounds, arguments.threads)
    result: dict[str, Any] = {"rows": rows, "for each thousand inputs": slopes(rows)}
    print(json.dumps(result["for each thousand inputs"], indent=1))
    for limit, holds in held(rows).items():
        print(f"{limit:<30} {'yes' if holds else 'NO'}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))
    if arguments.figure is not None:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
