# SPDX-License-Identifier: Apache-2.0
"""How often a certified mixture keeps its promise: a model with one layer that int8 ruins, over 100 random splits.

    python tests/benchmarks/search_seeds.py [--seeds 100] [--margin 1.0] [--samples 10000] [--certify 4000] [--json]

The Fashion-MNIST model gets three hidden units in one MLP that cancel in fp32 and leave noise in int8
(`tests/calibration/cancelling_units.py`).

**The same for all seeds**: the model, its calibration on held-out training pictures, and so the ladder; the fp32
model's and each rung's answer to each picture, which depend on nothing else and are computed once, when the first seed
asks for the rung; each rung's time, measured once. **Varied by the seed**: which pictures are searched on (30 %),
certified on (``--certify``) and fresh (the rest), drawn without replacement; hence which rungs hold, how far the search
climbs, the order, where the fixed sequence stops, and what is kept. Each seed goes through the functions of `search`.

Counted is how often something is certified; of these, how often the kept rung's drop on the fresh pictures is within
the margin, and how often that on all pictures; and how often the layer that was changed is no longer int8. Splits of
one set of pictures overlap, so seeds are not independent experiments: how often the bounds themselves are wrong is what
`bound_coverage.py` measures.

Of each rung that was asked for: the pictures that would certify it 99 times in 100, (z₀.₉₅ + z₀.₉₉)² σ² / (margin −
drop)², σ² the variance of one picture's flip. With fewer, seeds end undecided: nothing is certified, which is no wrong
promise, but no bundle either.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from perceiver_export.calibration.drops import drop
from perceiver_export.calibration.ladder import Ladder
from perceiver_export.calibration.observe import observe
from perceiver_export.calibration.pipeline import part_options
from perceiver_export.calibration.sequence import climb, fixed_order, fixed_sequence, gains
from perceiver_export.exporter import export
from perceiver_export.runtimes import Bundle, open_task
from perceiver_export.runtimes.benchmark import bench
from perceiver_export.runtimes.runtime import Array

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.calibration.cancelling_units import LAYER, with_cancelling_units

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"
_SEARCH = 0.3  # share of the test pictures that are searched on
_LEAST_GAIN = 0.02
_POWER = 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--margin", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--certify", type=int, help="pictures to certify on; 40 %% of --samples by default")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    certify = options.certify or int(0.4 * options.samples)
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), options.seeds, options.margin / 100, options.samples, certify)
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        return
    print(f"the layer that was changed: {LAYER}.output; found to be the most sensitive: {found['first']}")
    for row in found["rungs"]:
        needed = "no number certifies it" if row["needed"] is None else f"{row['needed']:,} pictures certify it"
        kept = f"kept in {row['kept']} seeds"
        print(f"  rung {row['step']}, {row['layers']}: {row['time']:.2f} × fp32's time, {kept}")
        print(f"    drop on all pictures {row['drop']:+.2f} points, {row['flips']:.2f} % flip; {needed}")
    print(
        f"certified in {found['certified']} of {found['seeds']} seeds, on {found['pictures']:,} pictures; of these the"
        f" drop on fresh pictures is within {options.margin:g} points in {found['fresh']}, that on all pictures in"
        f" {found['true']}, and the layer went back in {found['back']}"
    )


class Pool:
    """The fp32 model's and the rungs' right answers to all pictures, and the rungs' times, each found once."""

    def __init__(self, folder: Path, samples: int) -> None:
        self._folder, self._samples = folder, samples
        self.source = export(with_cancelling_units(), folder / "fp32")
        observation = observe(self.source, FASHION / "held_out.npz", 128, None, _quiet)
        self.ladder = Ladder(self.source, observation, part_options(self.source), 100.0, None, _quiet)
        self.reference = self._right(self.source)
        self.answers: dict[int, Array] = {}
        self.times: dict[int, float] = {}

    def flips(self, step: int, rows: Array) -> tuple[int, int]:
        """Pictures of ``rows`` that are right in fp32 only, and in this rung only."""
        if step not in self.answers:
            path = self._folder / f"rung-{step}"
            self.ladder.build(step, path)
            self.answers[step] = self._right(path)
            self.times[step] = bench(path, against=self.source.path, device="ort-cpu", runs=40).ratio or 1.0
        reference, candidate = self.reference[rows], self.answers[step][rows]
        return int((reference & ~candidate).sum()), int((candidate & ~reference).sum())

    def _right(self, bundle: Bundle | Path) -> Array:
        with np.load(FASHION / "test.npz") as data, open_task(bundle, "ort-cpu") as task:
            pictures, labels = data["image"][: self._samples], data["labels"][: self._samples]
            found: Array = task.logits(list(pictures)).argmax(axis=1) == labels
        return found


def run(folder: Path, seeds: int, margin: float, samples: int, certify: int) -> dict[str, Any]:
    pool = Pool(folder, samples)
    kept = [choose(pool, seed, margin, certify) for seed in range(seeds)]
    certified = [one for one in kept if one is not None]
    chosen = [step for step, _ in certified]
    rungs = [_row(pool, step, margin) | {"kept": chosen.count(step)} for step in sorted(pool.answers)]
    drops = {row["step"]: row["drop"] for row in rungs}
    return {
        "first": pool.ladder.ranking[0].group,
        "rungs": rungs,
        "seeds": seeds,
        "pictures": certify,
        "certified": len(certified),
        "fresh": sum(fresh <= margin for _, fresh in certified),
        "true": sum(drops[step] <= 100 * margin for step in chosen),
        "back": sum(f"{LAYER}.output" in pool.ladder.raised(step) for step in chosen),
    }


def choose(pool: Pool, seed: int, margin: float, certify: int) -> tuple[int, float] | None:
    """The rung that is kept on this seed's splits, and its drop on the fresh pictures."""
    shuffled = np.random.default_rng(seed).permutation(len(pool.reference))
    searching = int(_SEARCH * len(shuffled))
    searched, certified, fresh = np.split(shuffled, [searching, searching + certify])
    held: dict[int, bool] = {}

    def holds(step: int) -> bool:
        held[step] = drop(*pool.flips(step, searched), len(searched)).upper <= margin
        return held[step]

    climb(len(pool.ladder.rungs), holds, lambda low, high: gains(pool.times[low], pool.times[high], _LEAST_GAIN))
    order = fixed_order({step: pool.times[step] for step in held}, held, _LEAST_GAIN)
    kept = fixed_sequence(order, lambda step: drop(*pool.flips(step, certified), len(certified)).upper <= margin)
    if kept is None:
        return None
    lost, gained = pool.flips(kept, fresh)
    return kept, (lost - gained) / len(fresh)


def _row(pool: Pool, step: int, margin: float) -> dict[str, Any]:
    """What a rung is on all pictures, and how many would certify it."""
    total = len(pool.reference)
    lost, gained = pool.flips(step, np.arange(total))
    fall, flips = (lost - gained) / total, (lost + gained) / total
    z = float(norm.ppf(0.95) + norm.ppf(_POWER))
    needed = int(np.ceil(z**2 * (flips - fall**2) / (margin - fall) ** 2)) if fall < margin else None
    raised = pool.ladder.raised(step)
    layers = ", ".join(f"{name}: {scheme}" for name, scheme in raised.items()) or "all int8"
    shown = {"step": step, "layers": layers, "time": pool.times[step]}
    return {**shown, "drop": 100 * fall, "flips": 100 * flips, "needed": needed}


def _quiet(what: str, done: int, total: int) -> None: ...


if __name__ == "__main__":
    main()
