# SPDX-License-Identifier: Apache-2.0
"""Metrics, and families of metrics that judge one kind of output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from perceiver_export.runtimes.runtime import Array

Outputs = Mapping[str, Array]
# A statistic of all samples: values (n, ...) and how often each sample counts (..., n) -> (...).
Statistic = Callable[[Array, Array], Array]


class Metric(msgspec.Struct, frozen=True):
    """``quality`` is measured against targets, ``likeness`` against the reference's outputs.

    ``share``: each sample counts 0 or 1, and bounds are exact. ``fraction``: the weighted mean of numbers from 0 to 1;
    ``mean``: of any numbers; ``exp`` and ``root``: its exponential (perplexities) and its square root. ``statistic``: a
    number for all samples together that single samples do not have. All but shares have bootstrap bounds.
    """

    name: str
    of: Literal["quality", "likeness"]
    better: Literal["higher", "lower"]
    kind: Literal["share", "fraction", "mean", "exp", "root", "statistic"] = "mean"
    unit: str = ""
    statistic: Statistic | None = None

    @property
    def can_worsen(self) -> bool:
        """Whether a gate can limit how much worse it gets: a quality falls, a distance grows."""
        return self.of == "quality" or self.better == "lower"

    @property
    def scale(self) -> float:
        """The factor that converts its values to its unit."""
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class Column:
    """One value per sample and its weight in means; for a statistic, its inputs per sample (n, ...)."""

    values: Array
    weights: Array

    @classmethod
    def of(cls, values: Array, weights: Array | None = None) -> Column:
        """A column in float64, by default with weight 1 for each sample."""
        numbers = np.asarray(values, np.float64)
        return cls(numbers, np.ones(len(numbers)) if weights is None else np.asarray(weights, np.float64))

    @classmethod
    def mean(cls, values: Array, known: Array) -> Column:
        """Each sample's mean of the values (n, ...) that are ``known``, weighted by their number."""
        axes = tuple(range(1, known.ndim))
        counts = known.sum(axis=axes)
        return cls.of(np.where(known, values, 0).sum(axis=axes) / np.maximum(counts, 1), counts)


Columns = dict[str, Column]


class Family:
    """How one kind of output is judged. Outputs and targets are arrays (n, ...) by name (`calibration.data`).

    ``metrics``: gates that name no metric take the first one measured against targets. ``targets``: the targets that
    quality needs; None if nothing measures quality. ``telling``: a model that beats the naive model in none of these
    metrics is guessing.

    The naive model ignores its input; it shows what any model can achieve. A gate that it passes shows nothing, and a
    reference must beat it. `seen` summarizes a batch in columns, and in arrays that add up; `naive` computes the naive
    model's metrics from all columns and sums.
    """

    metrics: tuple[Metric, ...] = ()
    targets: tuple[str, ...] | None = None
    telling: tuple[str, ...] = ()
    output: str | None = None
    says = "always giving the same answer"

    def __init__(self, output: str | None = None) -> None:
        self.output = output or self.output

    def judged_by(self, targets: Outputs) -> bool:
        """Whether these targets suffice for `quality`."""
        return self.targets is not None and targets.keys() >= set(self.targets)

    def quality(self, outputs: Outputs, targets: Outputs) -> Columns:
        """How good answers are: columns by metric."""
        return {}

    def likeness(self, outputs: Outputs, reference: Outputs, targets: Outputs) -> Columns:
        """How similar answers are to the reference's: columns by metric."""
        return {}

    def guess(self, outputs: Outputs, targets: Outputs) -> Outputs | None:
        """The naive model's outputs for a batch, if they are known batch by batch."""
        return None

    def seen(self, outputs: Outputs, targets: Outputs) -> Mapping[str, Column | Array]:
        """A summary of a batch of the reference's outputs (without a reference, the model's)."""
        guess = self.guess(outputs, targets)
        if guess is None:
            return {}
        return self.likeness(guess, outputs, targets) | (
            self.quality(guess, targets) if self.judged_by(targets) else {}
        )

    def naive(self, seen: Mapping[str, Any], names: Sequence[str]) -> tuple[str, dict[str, float]]:
        """The naive model in words, and its metrics from all summaries, shares from 0 to 1."""
        return self.says, {
            name: float((one.values * one.weights).sum() / max(one.weights.sum(), 1e-12)) for name, one in seen.items()
        }

    def reads(self, metric: str, outputs: Sequence[str]) -> tuple[str, ...]:
        """The outputs that a metric depends on."""
        return tuple(outputs) if self.output is None else (self.output,)

    def answers(self, outputs: Outputs) -> Array | None:
        """The model's answer to each sample (n, ...), if people can read it; of classifiers, indices (n,)."""
        return None

    def text(self, answer: Array, names: Sequence[str]) -> str:
        """One answer, or one true label, in words."""
        return str(answer)

    def scores(self, outputs: Outputs) -> Array:
        """Its output as (n, values)."""
        found = outputs[self.output or ""]
        return found.reshape(len(found), -1)
