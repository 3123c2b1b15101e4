# SPDX-License-Identifier: Apache-2.0
"""Scores of two models on the same samples, collected batch by batch, and the metrics with bounds that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property

import msgspec
import numpy as np

from perceiver_export.calibration.data.samples import Example, partly_labelled
from perceiver_export.calibration.validation.metrics import metrics_of
from perceiver_export.calibration.validation.metrics.base import Column, Columns, Family, Metric, Outputs
from perceiver_export.calibration.validation.metrics.own import Own
from perceiver_export.calibration.validation.statistics import (
    FIXED,
    LEAST_FOR_BOOTSTRAP,
    Bounds,
    Estimate,
    bootstrap,
    share,
)
from perceiver_export.calibration.validation.worst import Worst, WorstClass, worst_classes
from perceiver_export.runtimes.runtime import Array

_LARGEST_EXPONENT = 700.0  # of float64; a ruined model's surprise may be larger
_ALIKE = 1e-6  # of their size: outputs that differ by less are equal


class MetricResult(msgspec.Struct, frozen=True):
    """One metric. Shares and their bounds are in percent, their worsening in points.

    ``kind`` is `Metric.kind`. A quality has both sides and ``worsening`` (positive: the candidate is worse); a likeness
    has only ``candidate``. ``lost``, ``gained``: samples that only the reference, or only the candidate, gets right;
    for shares only.
    """

    name: str
    of: str
    better: str
    unit: str
    candidate: Estimate
    reference: Estimate | None = None
    worsening: Estimate | None = None
    kind: str = "mean"
    lost: int | None = None
    gained: int | None = None


def value_of(metric: Metric, column: Column, counts: Array | None = None) -> Array:
    """One side's value (...), shares from 0 to 1; each sample counts ``counts`` (..., n) times, by default once."""
    weights = np.ones(len(column.values), np.int64) if counts is None else counts
    if metric.statistic is not None:
        return metric.statistic(column.values, weights)
    drawn = weights.astype(np.float64)
    found: Array = drawn @ (column.values * column.weights) / np.maximum(drawn @ column.weights, 1e-12)
    return np.exp(found) if metric.kind == "exp" else np.sqrt(found) if metric.kind == "root" else found


def estimate(metric: Metric, column: Column, bounds: Bounds = FIXED) -> Estimate:
    """One side's value with one-sided bounds: exact for shares, which are from 0 to 1, by bootstrap for all others."""
    if metric.kind == "share":
        return bounds.share(int(column.values.sum()), len(column.values))
    found = _resampled(metric, (column,), lambda counts: value_of(metric, column, counts))
    return Estimate(found.value, max(0.0, found.lower), min(1.0, found.upper)) if metric.kind == "fraction" else found


def worsening(
    metric: Metric, candidate: Column, reference: Column, relative: bool = False, bounds: Bounds = FIXED
) -> Estimate:
    """How much worse the candidate is, positive if it is; if ``relative``, as a share of the reference's value."""
    if metric.kind == "share" and not relative:
        return bounds.drop(*_flips(candidate, reference), len(candidate.values))
    sign = 1.0 if metric.better == "lower" else -1.0

    def change(counts: Array) -> Array:
        one, other = (value_of(metric, side, counts) for side in (candidate, reference))
        found: Array = sign * (one - other) + 0.0  # adding 0 turns -0 into 0
        return found / np.maximum(np.abs(other), 1e-12) if relative else found

    level = max(abs(float(value_of(metric, reference))), 1e-12) if relative else 1.0
    return _resampled(metric, (candidate, reference), change, 1 / level)


def _resampled(
    metric: Metric, columns: Sequence[Column], statistic: Callable[[Array], Array], scale: float = 1.0
) -> Estimate:
    """Bounds by bootstrap, or, if all samples of a fraction are equal, by how rare a different one can be.

    Resampling shows nothing about samples that were not drawn; 0 of n samples bounds how many of those can differ.
    """
    count = len(columns[0].values)
    if all((array == array[0]).all() for column in columns for array in (column.values, column.weights)):
        value = float(statistic(np.ones(count, np.int64)))
        found = Estimate(value, value, value)
    else:
        width = sum(int(np.prod(column.values.shape[1:])) for column in columns) if metric.statistic else 0
        found = bootstrap(count, statistic, width)
    if metric.kind == "fraction" and found.lower == found.upper:
        rare = scale * share(0, count).upper
        return Estimate(found.value, found.value - rare, found.value + rare)
    return found


def _flips(candidate: Column, reference: Column) -> tuple[int, int]:
    """How many samples only the reference gets right, and how many only the candidate."""
    found, expected = candidate.values > 0, reference.values > 0
    return int((expected & ~found).sum()), int((found & ~expected).sum())


class Scores:
    """Scores of every sample of one or two sides, collected by `add`.

    ``families`` are those of `metrics.families`; the first that is not your own metric's reads labels and answers.
    ``worst``: how many of the worst samples to keep. ``names``: of the labels. ``bounds``: of shares.

    ``parts``: columns by side, a part for each batch. ``sums``: the sums of each family's `Family.seen`. ``unused``:
    targets that no metric uses.
    """

    def __init__(self, families: Sequence[Family], worst: int, names: Sequence[str], bounds: Bounds = FIXED) -> None:
        self.bounds = bounds
        self.worst = Worst(worst)
        self.metrics = metrics_of(families)
        self._families, self._names = families, names
        self._main = next(family for family in families if not isinstance(family, Own))
        self.parts: dict[str, list[Columns]] = {}
        self.sums: list[dict[str, Array]] = [{} for _ in families]
        self.unused: set[str] = set()

    @property
    def count(self) -> int:
        """Samples so far."""
        return self.worst.seen

    def add(self, batch: Sequence[Example], outputs: Outputs, reference: Outputs | None, targets: Outputs) -> None:
        """Add a batch. Raises DataError if only some batches have targets, or targets do not fit the metrics."""
        sides = {"quality": self._quality(outputs, targets), "reference": Columns(), "likeness": Columns()}
        if reference is not None:
            sides["reference"] = self._quality(reference, targets)
            for family in reversed(self._families):
                sides["likeness"] |= family.likeness(outputs, reference, targets)
        said = {"candidate": self._main.answers(outputs)}
        said["reference"] = None if reference is None else self._main.answers(reference)
        said["label"] = targets.get("label") if "label" in (self._main.targets or ()) else None
        answers = {name: array for name, array in said.items() if array is not None}
        texts = {name: [self._main.text(one, self._names) for one in array] for name, array in answers.items()}
        sides["answers"] = {name: Column.of(array) for name, array in answers.items() if name != "candidate"}
        sides |= self._watch(outputs if reference is None else reference, targets)
        for name, side in sides.items():
            if self.count and side.keys() != self.parts[name][0].keys():
                fewer = len(side) < len(self.parts[name][0])
                raise partly_labelled(f"{batch[0].name} has {'none' if fewer else 'one, but none before it'}")
            self.parts.setdefault(name, []).append(side)
        for computed in ("sides", "naive"):  # of the samples so far
            self.__dict__.pop(computed, None)
        columns = sides["quality"] | sides["likeness"]
        single = [metric for metric in self.metrics if metric.name in columns and metric.kind != "statistic"]
        values = {metric.name: _of_samples(metric, columns[metric.name]) for metric in single}
        self.worst.add(batch, _badness(single, sides, len(batch)), values, texts)

    def _quality(self, outputs: Outputs, targets: Outputs) -> Columns:
        found: Columns = {}
        for family in reversed(self._families):
            if family.judged_by(targets):
                found |= family.quality(outputs, targets)
        if self._main is self._families[0] and not self._main.judged_by(targets):  # your own metric might use them
            self.unused.update(targets if self._main.targets else targets.keys() & {"label"})
        return found

    def _watch(self, outputs: Outputs, targets: Outputs) -> dict[str, Columns]:
        """Add to the sums of the naive models; return their columns, and each output's projection and size."""
        found: dict[str, Columns] = {"outputs": {}}
        for index, (family, sums) in enumerate(zip(self._families, self.sums, strict=True)):
            seen = family.seen(outputs, targets)
            found[f"naive {index}"] = {name: one for name, one in seen.items() if isinstance(one, Column)}
            for name, one in seen.items():
                if not isinstance(one, Column):
                    sums[name] = sums[name] + one if name in sums else one
        for name, array in outputs.items():
            rows = array.reshape(len(array), -1)
            values = np.array([row.astype(np.float64) @ _direction(len(row)) for row in rows])
            found["outputs"][name] = Column.of(values, np.maximum(rows.max(axis=1), -rows.min(axis=1)))
        return found

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(self.sides["outputs"])

    @cached_property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """The outputs that each metric depends on."""
        pairs = [(family, metric.name) for family in reversed(self._families) for metric in family.metrics]
        return {name: family.reads(name, self.outputs) for family, name in pairs}

    def blind(self, metric: Metric) -> str:
        """Why this metric does not tell models apart; empty if it does."""
        reads = self.reads[metric.name]
        if not reads:
            return f"{metric.name} does not depend on the outputs"
        columns = [self.sides["outputs"][name] for name in reads]
        if self.count < 2 or any(np.ptp(one.values) > _ALIKE * one.weights.max() for one in columns):
            return ""
        return f"the reference gives the same {' and '.join(map(repr, reads))} for all samples"

    @cached_property
    def sides(self) -> dict[str, Columns]:
        """``quality`` of the candidate and of the ``reference``, and ``likeness`` of the two, by metric.

        Also the ``outputs`` of `_watch`, the ``answers`` of the reference and the labels, and ``naive`` models.
        """
        return {
            side: {name: joined([part[name] for part in parts]) for name in parts[0]}
            for side, parts in self.parts.items()
        }

    @cached_property
    def naive(self) -> dict[str, tuple[str, float]]:
        """The naive model of each metric (`base.Family`) in words, and its value."""
        found = {}
        for index, (family, sums) in reversed([*enumerate(zip(self._families, self.sums, strict=True))]):
            says, values = family.naive(sums | self.sides[f"naive {index}"], self._names)
            found.update({name: (says, value) for name, value in values.items()})
        return found

    @property
    def measured(self) -> Columns:
        """The candidate's columns, of quality and of likeness."""
        return self.sides["quality"] | self.sides["likeness"]

    def flips(self, metric: Metric) -> tuple[int, int]:
        """Samples that a share lost and gained; for agreement, those that differ."""
        column = self.measured[metric.name]
        return _flips(column, self.sides["reference"].get(metric.name, Column.of(np.ones(self.count))))

    def distance(self, metric: Metric, relative: bool = False) -> Estimate:
        """How much worse a quality is than the reference's, as in `worsening`; likenesses are returned unchanged."""
        if metric.of == "likeness":
            return estimate(metric, self.sides["likeness"][metric.name], self.bounds)
        quality, reference = (self.sides[side][metric.name] for side in ("quality", "reference"))
        return worsening(metric, quality, reference, relative, self.bounds)

    def guessed(self, metric: Metric, relative: bool = False) -> float | None:
        """The `distance` of the naive model; None if it is not known."""
        if metric.name not in self.naive:
            return None
        value = self.naive[metric.name][1]
        if metric.of == "likeness":
            return value
        reference = float(value_of(metric, self.sides["reference"][metric.name]))
        worse = value - reference if metric.better == "lower" else reference - value
        return worse / max(abs(reference), 1e-12) if relative else worse

    def results(self) -> tuple[MetricResult, ...]:
        """Every metric that was measured, in the family's order."""
        return tuple(self._result(metric) for metric in self.metrics if metric.name in self.measured)

    def _result(self, metric: Metric) -> MetricResult:
        found = estimate(metric, self.measured[metric.name], self.bounds).times(metric.scale)
        described = (metric.name, metric.of, metric.better, metric.unit, found)
        if metric.name not in self.sides["reference"]:
            return MetricResult(*described, kind=metric.kind)
        expected = estimate(metric, self.sides["reference"][metric.name], self.bounds).times(metric.scale)
        lost, gained = self.flips(metric) if metric.kind == "share" else (None, None)
        worse = self.distance(metric).times(metric.scale)
        return MetricResult(*described, expected, worse, metric.kind, lost, gained)

    def warnings(self) -> dict[str, str]:
        """Warnings by kind: reasons why these numbers mean less than they seem to."""
        found = {}
        if self.count < LEAST_FOR_BOOTSTRAP:
            plural = "s" if self.count > 1 else ""
            found["few"] = f"only {self.count} sample{plural}: exact bounds are wide, bootstrap bounds too narrow"
        if self.unused:
            names, wanted = ", ".join(sorted(self.unused)), ", ".join(self._main.targets or ())
            why = f"this task is judged by `{wanted}`" if wanted else "only a --metric module:function can use it"
            found["unused"] = f"no metric uses the data's {names}: {why}"
        elif self._main.targets and self.sides["likeness"] and not self.sides["quality"]:
            wanted = ", ".join(self._main.targets)
            found["unlabelled"] = f"the data has no `{wanted}`: only agreement with the reference is judged"
        labels = self.sides["answers"].get("label")
        if labels is not None and self.count > 1 and (labels.values == labels.values[0]).all():
            return {**found, "one label": "all samples have the same label: nothing is known about the others"}
        return found | self._guessing()

    def _guessing(self) -> dict[str, str]:
        """The warning that the reference (without one, the model) does not beat the naive model.

        Its bounds decide, or with too few samples for bounds, its measured value.
        """
        side, few = self.sides["reference"] or self.sides["quality"], self.count < LEAST_FOR_BOOTSTRAP
        said = {}
        for metric in self.metrics:
            if metric.name in self._main.telling and metric.name in side and metric.name in self.naive:
                found, (says, guessed) = estimate(metric, side[metric.name], self.bounds), self.naive[metric.name]
                least, most = (found.value, found.value) if few else (found.lower, found.upper)
                if least > guessed if metric.better == "higher" else most < guessed:
                    return {}
                values = (f"{metric.scale * value:.4g} {metric.unit}".strip() for value in (found.value, guessed))
                said[metric.name] = "{} {}, {} gives {}".format(metric.name, next(values), says, *values)
        role = "reference" if self.sides["reference"] else "model"
        why = "it may be untrained, or the data may have another model's labels or preprocessing"
        chance = f"the {role} is no better than chance on these samples"
        return {"chance": f"{chance} ({next(iter(said.values()))}): {why}"} if said else {}

    def worst_classes(self) -> tuple[WorstClass, ...]:
        """Classes by label, or without labels by the reference's answer; empty unless answers are indices."""
        answers = self.sides["answers"]
        column = answers.get("label", answers.get("reference"))
        if column is None or column.values.ndim != 1:
            return ()
        classes = column.values.astype(np.int64)
        named = {"quality": "top-1", "reference": "top-1", "likeness": "agreement"}
        columns = [self.sides[side].get(name) for side, name in named.items()]
        names = self._names or [str(index) for index in range(int(classes.max()) + 1)]
        return worst_classes(names, classes, *(None if one is None else one.values > 0 for one in columns))


def joined(columns: Sequence[Column], order: Array | None = None) -> Column:
    """Columns of several batches as one, its rows in ``order``."""
    values, weights = (np.concatenate([getattr(column, of) for column in columns]) for of in ("values", "weights"))
    return Column(values, weights) if order is None else Column(values[order], weights[order])


@cache
def _direction(width: int) -> Array:
    """A vector of length 1: outputs with the same projection on it are equal."""
    found = np.random.default_rng(0).normal(size=width)
    return found / np.linalg.norm(found)


def _of_samples(metric: Metric, column: Column) -> Array:
    """Values (n,) of single samples in the metric's unit: perplexities rather than their logarithms."""
    if metric.kind == "exp":
        return np.asarray(np.exp(np.minimum(column.values, _LARGEST_EXPONENT)))
    return metric.scale * (np.sqrt(column.values) if metric.kind == "root" else column.values)


def _badness(metrics: Sequence[Metric], sides: Mapping[str, Columns], count: int) -> Array:
    """(n, 2): how far the first quality fell (without a reference, how bad it is), and the first distance.

    Agreement, which is only yes or no, comes after distances.
    """
    found = np.zeros((count, 2))
    first = next((metric for metric in metrics if metric.of == "quality"), None)
    if first is not None:
        before = sides["reference"][first.name].values if sides["reference"] else 0.0
        found[:, 0] = (sides["quality"][first.name].values - before) * (1 if first.better == "lower" else -1)
    distances = [metric for metric in metrics if metric.of == "likeness"]
    for metric in sorted(distances, key=lambda metric: metric.better == "higher")[:1]:
        found[:, 1] = sides["likeness"][metric.name].values * (1 if metric.better == "lower" else -1)
    return found
