# SPDX-License-Identifier: Apache-2.0
"""How often the bounds of `validate` are wrong: 10,000 synthetic pairs of models whose true drop is known.

    python -m tests.benchmarks.bound_coverage [--pairs 10000]

For each pair the benchmark draws how many of n samples only the reference, or only the candidate, gets right (shares
p_lost and p_gained), so the true drop is p_lost − p_gained. A bound is wrong if the true value lies beyond it, which
may happen for 5 % of the pairs. The table also has the normal approximation, which other tools use. Means: the mean of
skewed losses, by bootstrap. The last rows show how often a number of samples certifies a margin that the true drop
keeps, summed over all outcomes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from perceiver_export.calibration.validation.planning import power_of_drop
from perceiver_export.calibration.validation.statistics import CONFIDENCE, bootstrap, p_value, share
from perceiver_export.runtimes.runtime import Array
from tests.benchmarks.harness import Row, command

# (samples, p_lost, p_gained): few flips and many, no drop and some.
CASES = (
    (300, 0.010, 0.010),
    (1_000, 0.004, 0.001),
    (1_000, 0.030, 0.020),
    (2_000, 0.002, 0.000),
    (10_000, 0.006, 0.004),
    (10_000, 0.0005, 0.0002),
    (10_000, 0.040, 0.030),
)
POWER = (1_200, 2_000, 4_000)  # samples to certify 1 point on, of shares 0.006 lost and 0.004 gained
MEANS = ((30, 0.5), (200, 1.0), (1_000, 1.0))  # (samples, sigma of the log-normal loss)


def measure(work: Path, pairs: int = 10_000) -> Iterator[Row]:
    """Shares of pairs in percent."""
    yield from (*drops(pairs), *agreements(pairs), *means(pairs // 10))
    for samples in POWER:
        yield {
            "samples": samples,
            "certify 1 point of a drop of 0.2, %": 100 * power_of_drop(samples, 0.006, 0.004, 0.01),
        }


def _row(bound: str, samples: int, wrong: float, normal: float | None = None) -> Row:
    row = {"bound": bound, "samples": samples, "truth beyond the bound, %": 100 * wrong}
    return row | {"normal approximation, %": None if normal is None else 100 * normal}


def drops(pairs: int) -> Iterator[Row]:
    generator = np.random.default_rng(0)
    z = stats.norm.ppf(0.95)
    for samples, p_lost, p_gained in CASES:
        drawn = generator.multinomial(samples, [p_lost, p_gained, 1 - p_lost - p_gained], size=pairs)
        counts, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
        true = p_lost - p_gained
        # The bound is the largest drop that the test accepts, so it is below the true drop if the test rejects that.
        chances = [p_value(int(lost), int(gained), samples, true) for lost, gained in counts]
        refused = np.array(chances) <= 1 - CONFIDENCE
        value = (counts[:, 0] - counts[:, 1]) / samples
        normal = value + z * np.sqrt(np.maximum(counts.sum(axis=1) / samples - value**2, 0) / samples)
        shares = (float(times[wrong].sum() / pairs) for wrong in (refused, normal < true - 1e-12))
        yield _row(f"drop of {100 * true:.2f} points, {100 * (p_lost + p_gained):.2f} % flip", samples, *shares)


def agreements(pairs: int) -> Iterator[Row]:
    generator = np.random.default_rng(1)
    for samples, agreement in ((300, 0.99), (10_000, 0.985)):
        counts, times = np.unique(generator.binomial(samples, agreement, size=pairs), return_counts=True)
        bounds = np.array([share(int(count), samples).lower for count in counts])
        yield _row(f"agreement of {100 * agreement:g} %", samples, float(times[bounds > agreement].sum() / pairs))


def means(pairs: int) -> Iterator[Row]:
    generator = np.random.default_rng(2)
    for samples, sigma in MEANS:
        true, wrong = float(np.exp(sigma**2 / 2)), 0
        for _ in range(pairs):
            losses = generator.lognormal(0, sigma, samples)
            wrong += bootstrap(samples, partial(_mean, losses)).upper < true
        yield _row(f"mean of log-normal losses (sigma {sigma:g})", samples, wrong / pairs)


def _mean(values: Array, counts: Array) -> Array:
    return np.asarray(counts @ values / len(values))


if __name__ == "__main__":
    command(measure)
