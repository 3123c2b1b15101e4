# SPDX-License-Identifier: Apache-2.0
"""How often a certified mixture keeps its promise: a model with one layer that int8 ruins, over 100 random splits.

    python tests/benchmarks/search_seeds.py [--seeds 100] [--margin 1.0] [--samples 10000] [--rungs 5] [--json]

The Fashion-MNIST model gets three hidden units in one MLP that cancel in fp32 and leave noise in int8
(`tests/calibration/cancelling_units.py`). Rungs of the ladder of `calibration.mixed_precision` are quantized,
calibrated on held-out training pictures, and run once over the 10,000 test pictures. Each seed then splits these into
30 % to search on, 40 % to certify on and 30 % fresh ones, and goes through the same selection as `search`. Counted
is how often the kept rung's drop on the fresh pictures is within the margin, and whether the changed layer is the
first to go back.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.calibration.drops import drop
from perceiver_export.calibration.mixed_precision import fixed_order, fixed_sequence, steps
from perceiver_export.calibration.pipeline import quantize
from perceiver_export.calibration.sensitivity import measure_sensitivity
from perceiver_export.exporter import export
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.benchmark import bench
from perceiver_export.runtimes.runtime import Array

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.calibration.cancelling_units import LAYER, with_cancelling_units

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"
_SEARCH, _CERTIFY = 0.3, 0.4  # shares of the test pictures; the rest is fresh


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--margin", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rungs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), options.seeds, options.margin / 100, options.samples, options.rungs)
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        return
    print(f"the layer that was changed: {LAYER}.output; found to be the most sensitive: {found['first']}")
    for row in found["rungs"]:
        measured = f"{row['time']:.2f} × fp32's time, drop on all pictures {row['drop']:+.2f} points"
        print(f"  {row['layers']:<60} {measured}")
    print(
        f"certified in {found['certified']} of {found['seeds']} seeds; of these the drop on fresh pictures is within"
        f" {100 * options.margin / 100:g} points in {found['kept']}, and the drop on all pictures in {found['true']}"
    )


def run(folder: Path, seeds: int, margin: float, samples: int, most: int) -> dict[str, Any]:
    source = export(with_cancelling_units(), folder / "fp32")
    held_out = FASHION / "held_out.npz"
    order = [one.group for one in measure_sensitivity(source, held_out)]
    reference = right(source.path, samples)
    rungs: list[dict[str, Any]] = []
    sides: list[Array] = []
    for index, precision in enumerate(steps(order)[:most]):
        made = quantize(source, held_out, folder / f"rung-{index}", precision=precision)
        sides.append(right(made.path, samples))
        fall = 100 * float(reference.mean() - sides[-1].mean())
        said = ", ".join(f"{name}: {scheme}" for name, scheme in precision.items()) or "all int8"
        rungs.append({"layers": said, "time": bench(made, against=source.path, runs=50).ratio or 1.0, "drop": fall})
    kept = [choose(reference, sides, [rung["time"] for rung in rungs], seed, margin) for seed in range(seeds)]
    certified = [one for one in kept if one is not None]
    return {
        "first": order[0],
        "rungs": rungs,
        "seeds": seeds,
        "certified": len(certified),
        "kept": sum(fresh <= margin for _, fresh in certified),
        "true": sum(rungs[index]["drop"] <= 100 * margin for index, _ in certified),
        "chosen": {str(index): sum(one == index for one, _ in certified) for index in range(len(rungs))},
    }


def choose(
    reference: Array, sides: list[Array], times: list[float], seed: int, margin: float
) -> tuple[int, float] | None:
    """The rung that is kept on this seed's splits, and its drop on the fresh pictures."""
    shuffled = np.random.default_rng(seed).permutation(len(reference))
    searched, certified, fresh = np.split(
        shuffled, [int(_SEARCH * len(shuffled)), int((_SEARCH + _CERTIFY) * len(shuffled))]
    )

    def held(index: int, rows: Array) -> bool:
        lost, gained = flips(reference[rows], sides[index][rows])
        return drop(lost, gained, len(rows)).upper <= margin

    on_search = [held(index, searched) for index in range(len(sides))]
    stop = min(len(sides), on_search.index(True) + 2) if True in on_search else 0
    order = fixed_order(times[:stop], on_search[:stop])
    kept = fixed_sequence(order, lambda index: held(index, certified))
    return None if kept is None else (kept, float(reference[fresh].mean() - sides[kept][fresh].mean()))


def flips(reference: Array, candidate: Array) -> tuple[int, int]:
    return int((reference & ~candidate).sum()), int((candidate & ~reference).sum())


def right(bundle: Path, samples: int) -> Array:
    with np.load(FASHION / "test.npz") as data, open_task(bundle) as task:
        found = task.logits(list(data["image"][:samples])).argmax(axis=1) == data["labels"][:samples]
    answers: Array = found
    return answers


if __name__ == "__main__":
    main()
