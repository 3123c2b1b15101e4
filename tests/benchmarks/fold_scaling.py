# SPDX-License-Identifier: Apache-2.0
"""Time and memory of an encoder against the number of its inputs M, folded and plain, on ONNX Runtime.

    python -m tests.benchmarks.fold_scaling [--rounds 3] [--threads 2] [--figure FILE.svg]

ImageNet's Fourier Perceiver IO with a single self-attention, on images of 100² to 632² pixels: only the
cross-attention grows with M. Both graphs are ours, `--fold` and `--no-fold`, each in fresh processes that take turns.
The last rows show whether the folded encoder's cost grows no faster than linearly, and slower than the plain one's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from tests.benchmarks.harness import Row, command, in_turn, medians
from tests.benchmarks.sides import golden_inputs, save_feeds, timed

SIDES = (100, 160, 224, 316, 447, 632)
KINDS = ("folded", "plain")


def measure(work: Path, rounds: int = 3, threads: int = 2, figure: Path | None = None) -> Iterator[Row]:
    """A row per size: M, milliseconds and MiB of both graphs; then a row per limit."""
    rows = []
    for side in SIDES:
        bundles = {kind: work / f"{kind}-{side}" for kind in KINDS}
        for kind, bundle in bundles.items():
            export_encoder(side, bundle, fold=kind == "folded")
        feeds = save_feeds(work, "feeds", golden_inputs(bundles["folded"]))
        sides = {kind: partial(timed, bundle, "ort", threads, feeds) for kind, bundle in bundles.items()}
        found = medians(in_turn(sides, rounds))
        row = {"inputs": side * side} | {
            f"{kind} {unit}": found[kind][unit] for kind in KINDS for unit in ("ms", "MiB")
        }
        rows.append(row)
        yield row
    yield from limits(rows)
    if figure is not None:
        draw(rows, figure)


def export_encoder(side: int, out: Path, fold: bool) -> None:
    """The model at this image size, with one self-attention."""
    import msgspec

    from perceiver_export.exporter import ExportOptions, export
    from perceiver_export.exporter.model.perceiver import PerceiverIO
    from perceiver_export.exporter.presets import load_preset

    full = load_preset("imagenet-fourier", "huggingface", (3, side, side))
    encoder = msgspec.structs.replace(full.config.encoder, num_blocks=1, num_self_attentions_per_block=1)
    config = msgspec.structs.replace(full.config, encoder=encoder)
    model = dataclasses.replace(full, model=PerceiverIO(config).eval(), config=config)
    export(model, out, ExportOptions(fold=fold))


def limits(rows: list[Row]) -> Iterator[Row]:
    """The folded graph's cost grows no faster than linearly with the inputs, and slower than the plain graph's."""
    first, last = rows[0], rows[-1]
    thousands = [row["inputs"] / 1e3 for row in rows]
    for unit in ("ms", "MiB"):
        slopes = {kind: float(np.polyfit(thousands, [row[f"{kind} {unit}"] for row in rows], 1)[0]) for kind in KINDS}
        growth = last[f"folded {unit}"] / first[f"folded {unit}"]
        linear = growth <= last["inputs"] / first["inputs"]
        yield {
            "unit": unit,
            "for each thousand inputs": slopes,
            "no faster than linearly": linear,
            "held": linear and slopes["folded"] < slopes["plain"],
        }


def draw(rows: list[Row], figure: Path) -> None:
    """Two panels: time and memory."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "perceiver-export"  # the same numbers, the same file
    from matplotlib import pyplot

    drawn, panels = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for panel, unit, title in zip(panels, ("ms", "MiB"), ("time of a call, ms", "peak memory, MiB"), strict=True):
        for kind, color in (("plain", "#999999"), ("folded", "#1f6feb")):
            values = [row[f"{kind} {unit}"] for row in rows]
            panel.plot([row["inputs"] / 1e3 for row in rows], values, "o-", color=color, label=kind)
        panel.set(title=title, xlabel="inputs M, thousands", ylim=(0, None))
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    drawn.savefig(figure, metadata={"Date": None})


if __name__ == "__main__":
    command(measure)
