# SPDX-License-Identifier: Apache-2.0
"""How often a certified mixture keeps its promise: a model with one layer that int8 ruins, over 100 random splits.

    python -m tests.benchmarks.search_seeds [--seeds 100] [--margin 1.0] [--samples 10000] [--certify 4000]

The Fashion-MNIST model gets three hidden units in one MLP that cancel in fp32 and leave noise in int8
(`tests/calibration/cancelling_units.py`).

**The same for all seeds**: the model, its calibration on held-out training images, and therefore the ladder; the
answers of the fp32 model and of each rung to each image, which are computed once, when the first seed asks for the
rung; each rung's time, measured once. **Varied by the seed**: which images are searched on (30 %), certified on
(``--certify``) and fresh (the rest), drawn without replacement; hence which rungs hold, how far the search climbs, the
order, where the fixed sequence stops, and which rung is kept. Each seed goes through the functions of `search`.

The benchmark counts how often something is certified; of these, how often the kept rung's drop is within the margin on
the fresh images, and on all images; and how often the changed layer is no longer int8. Splits of one set of images
overlap, so seeds are not independent experiments; `bound_coverage.py` measures how often the bounds themselves are
wrong.

For each rung that was tried, a row has the number of images that would certify it 99 times in 100: (z₀.₉₅ + z₀.₉₉)² σ²
/ (margin − drop)², where σ² is the variance of one image's flip. With fewer images some seeds end undecided: nothing is
certified, so no promise is wrong, but there is no bundle either.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.stats import norm

from perceiver_export.calibration.quantization.options import QuantizeOptions
from perceiver_export.calibration.quantization.search import climb, fixed_order, fixed_sequence, gains
from perceiver_export.calibration.quantization.sensitivity import Ladder
from perceiver_export.calibration.quantization.statistics import observe
from perceiver_export.calibration.validation.statistics import drop
from perceiver_export.exporter import export
from perceiver_export.runtimes import Bundle, open_task
from perceiver_export.runtimes.benchmark import bench
from perceiver_export.runtimes.runtime import Array
from tests.benchmarks.harness import FASHION, Row, command
from tests.calibration.cancelling_units import LAYER, with_cancelling_units

_SEARCH = 0.3  # share of the test images that are searched on
_LEAST_GAIN = 0.02
_POWER = 0.99


def measure(
    work: Path, seeds: int = 100, margin: float = 1.0, samples: int = 10_000, certify: int = 0
) -> Iterator[Row]:
    """A row per rung, then the counts. ``margin`` is in points; ``certify`` 0 is 40 % of ``samples``."""
    pool, certify, share = Pool(work, samples), certify or int(0.4 * samples), margin / 100
    kept = [one for one in (choose(pool, seed, share, certify) for seed in range(seeds)) if one is not None]
    chosen = [step for step, _ in kept]
    rungs = {step: rung(pool, step, share) for step in sorted(pool.answers)}
    for step, row in rungs.items():
        yield row | {"kept in seeds": chosen.count(step)}
    yield {
        "changed layer": f"{LAYER}.output",
        "most sensitive": pool.ladder.ranking[0].group,
        "seeds": seeds,
        "certified": len(kept),
        "drop on fresh images within the margin": sum(fresh <= share for _, fresh in kept),
        "drop on all images within": sum(rungs[step]["drop in points"] <= margin for step in chosen),
        "layer went back": sum(f"{LAYER}.output" in pool.ladder.raised(step) for step in chosen),
    }


class Pool:
    """Which images the fp32 model and each rung get right, and the rungs' times, each computed once."""

    def __init__(self, folder: Path, samples: int) -> None:
        self._folder, self._samples = folder, samples
        self.source = export(with_cancelling_units(), folder / "fp32")
        observation = observe(self.source, FASHION / "held_out.npz", QuantizeOptions(), _quiet)
        self.ladder = Ladder(self.source, observation, QuantizeOptions(), _quiet)
        self.reference = self._right(self.source)
        self.answers: dict[int, Array] = {}
        self.times: dict[int, float] = {}

    def flips(self, step: int, rows: Array) -> tuple[int, int]:
        """Images of ``rows`` that are right in fp32 only, and in this rung only."""
        if step not in self.answers:
            path = self._folder / f"rung-{step}"
            self.ladder.build(step, path)
            self.answers[step] = self._right(path)
            self.times[step] = bench(path, against=self.source.path, device="ort-cpu", runs=40).ratio or 1.0
        reference, candidate = self.reference[rows], self.answers[step][rows]
        return int((reference & ~candidate).sum()), int((candidate & ~reference).sum())

    def _right(self, bundle: Bundle | Path) -> Array:
        with np.load(FASHION / "test.npz") as data, open_task(bundle, "ort-cpu") as task:
            images, labels = data["image"][: self._samples], data["labels"][: self._samples]
            found: Array = task.logits(list(images)).argmax(axis=1) == labels
        return found


def choose(pool: Pool, seed: int, margin: float, certify: int) -> tuple[int, float] | None:
    """The rung that is kept on this seed's splits, and its drop on the fresh images."""
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


def rung(pool: Pool, step: int, margin: float) -> Row:
    """A rung on all images, and how many images would certify it; None if no number would."""
    total = len(pool.reference)
    lost, gained = pool.flips(step, np.arange(total))
    fall, flips = (lost - gained) / total, (lost + gained) / total
    z = float(norm.ppf(0.95) + norm.ppf(_POWER))
    return {
        "rung": step,
        "layers": ", ".join(f"{name}: {scheme}" for name, scheme in pool.ladder.raised(step).items()) or "all int8",
        "time over fp32": pool.times[step],
        "drop in points": 100 * fall,
        "flips, %": 100 * flips,
        "images that certify it": int(np.ceil(z**2 * (flips - fall**2) / (margin - fall) ** 2))
        if fall < margin
        else None,
    }


def _quiet(stage: str, done: int, total: int) -> None: ...


if __name__ == "__main__":
    command(measure)
