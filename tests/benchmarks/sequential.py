# SPDX-License-Identifier: Apache-2.0
"""How often a sequential run passes wrongly, and how many samples it takes where the case is clear.

    python -m tests.benchmarks.sequential [--runs 4000] [--samples 10000]

Each run draws the answers of two models: only the reference gets a share p_lost of the samples right, and only the
candidate a share p_gained. It is judged every 64 samples, as in `validate --sequential`. If the true drop equals the
margin, a pass is wrong, which may happen in 5 % of the runs. Otherwise the table has the mean number of samples taken,
and the fixed number with which a test passes in 95 % of the runs (`validate --plan`); nobody knows it in advance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from perceiver_export.calibration.validation.options import Gates
from perceiver_export.calibration.validation.planning import plan
from perceiver_export.calibration.validation.sequential import log_capital
from perceiver_export.calibration.validation.statistics import CONFIDENCE
from perceiver_export.runtimes.runtime import Array
from tests.benchmarks.harness import Row, command

_BATCH, _BLOCK = 64, 500  # samples between two looks, and runs at once
MARGIN = 0.006
AT_MARGIN = ((0.006, 0.0), (0.008, 0.002), (0.01, 0.004), (0.053, 0.047), (0.303, 0.297))  # (p_lost, p_gained)
CLEAR = ((0.0005, 0.0005), (0.0025, 0.0025), (0.005, 0.005), (0.01, 0.01), (0.02, 0.005), (0.06, 0.01))


def measure(work: Path, runs: int = 4_000, samples: int = 10_000) -> Iterator[Row]:
    """Shares of runs in percent, and numbers of samples."""
    for p_lost, p_gained in AT_MARGIN:
        passed, failed, _ = outcomes(p_lost, p_gained, runs, samples)
        wrong = 100 * passed.mean()
        case = f"drop {100 * MARGIN:g} points, {100 * (p_lost + p_gained):g} % flip"
        yield {"case": case, "wrong passes, %": wrong, "wrong fails, %": 100 * failed.mean(), "held": bool(wrong <= 5)}
    for p_lost, p_gained in CLEAR:
        passed, failed, taken = outcomes(p_lost, p_gained, runs, samples)
        fixed = None
        if p_lost == p_gained:
            fixed = plan(Gates(max_drop=100 * MARGIN), 200 * p_lost)[1].samples[-1]
        yield {
            "case": f"drop {100 * (p_lost - p_gained):g} points, {100 * (p_lost + p_gained):g} % flip",
            "pass, %": 100 * passed.mean(),
            "fail, %": 100 * failed.mean(),
            "samples taken": float(taken.mean()),
            "saved, %": 100 * (1 - float(taken.mean()) / samples),
            "samples of the fixed test": "" if fixed is None else fixed,
        }


def outcomes(p_lost: float, p_gained: float, runs: int, samples: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """For each run, whether it passes, whether it fails, and after how many samples it ends."""
    generator, blocks = np.random.default_rng(seed), []
    total = np.minimum(_BATCH * np.arange(1, math.ceil(samples / _BATCH) + 1), samples)
    sizes = np.diff(total, prepend=0)
    for start in range(0, runs, _BLOCK):
        count = min(_BLOCK, runs - start)
        drawn = generator.multinomial(sizes, [p_lost, p_gained, 1 - p_lost - p_gained], size=(count, len(sizes)))
        lost, gained = (np.cumsum(drawn[..., index], axis=1) for index in (0, 1))
        enough = -math.log1p(-CONFIDENCE)
        passing = log_capital(lost, gained, total, MARGIN) >= enough
        failing = log_capital(gained, lost, total, -MARGIN) >= enough
        first = [np.where(some.any(axis=1), some.argmax(axis=1), len(total)) for some in (passing, failing)]
        ends = np.minimum(np.minimum(*first), len(total) - 1)
        blocks.append((first[0] < np.minimum(first[1], len(total)), first[1] < first[0], total[ends]))
    passed, failed, taken = (np.concatenate(some) for some in zip(*blocks, strict=True))
    return passed, failed, taken


if __name__ == "__main__":
    command(measure)
