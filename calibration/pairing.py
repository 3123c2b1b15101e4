# SPDX-License-Identifier: Apache-2.0
"""What is kept while two models run over the same samples: a few numbers a sample, and the worst samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

from perceiver_export.calibration.examples import Example
from perceiver_export.calibration.metrics import share_of_right
from perceiver_export.calibration.metrics.base import Column, Columns, Metric
from perceiver_export.calibration.metrics.own import OwnMetric
from perceiver_export.calibration.scores import MetricResult, joined, measure, of_samples
from perceiver_export.calibration.statistics import LEAST_FOR_BOOTSTRAP
from perceiver_export.calibration.worst import Worst, WorstClass, badness, worst_classes
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.runtime import Array

Outputs = Mapping[str, Array]


class Scores:
    """Values of every sample: ``quality`` of the candidate and of the ``reference``, and ``likeness`` of the two.

    ``classes``: of classifiers, each sample's label and what both sides said, as indices (n,). ``choices``: how many
    answers the logits tell apart, 0 without logits. ``unused``: which targets nothing was judged by, in words.
    """

    def __init__(
        self,
        metrics: tuple[Metric, ...],
        sides: Mapping[str, list[Columns]],
        classes: Outputs,
        choices: int = 0,
        unused: str = "",
    ) -> None:
        self.metrics = metrics
        self.quality, self.reference, self.likeness = (joined(sides[n]) for n in ("quality", "reference", "likeness"))
        self.classes, self._choices, self._unused = classes, choices, unused

    def results(self) -> tuple[MetricResult, ...]:
        """Every metric that was measured, in the family's order."""
        found = []
        for metric in self.metrics:
            if metric.name in self.quality and metric.of == "quality":
                found.append(measure(metric, self.quality[metric.name], self.reference.get(metric.name)))
            elif metric.name in self.likeness and metric.of == "likeness":
                found.append(measure(metric, self.likeness[metric.name], None))
        return tuple(found)

    def warnings(self, samples: int, labels: int) -> dict[str, str]:
        """By kind, what makes these numbers say less than they seem to."""
        found = {}
        if samples < LEAST_FOR_BOOTSTRAP:
            plural = "s" if samples > 1 else ""
            found["few"] = f"only {samples} sample{plural}: bounds are wide, those of means too narrow"
        if self._unused:
            found["unused"] = self._unused
        seen = np.unique(self.classes.get("label", ()))
        if len(seen) == 1 and labels > 1 and samples > 1:
            found["one label"] = "all samples have one label: this says nothing of the others"
        found |= self._guessing()
        return found

    def _guessing(self) -> dict[str, str]:
        """The warning of a model, the reference if there is one, that is right no oftener than one that guesses."""
        side = self.reference or self.quality
        metric = share_of_right(tuple(one for one in self.metrics if ":" not in one.name))  # of the task, not one's own
        if metric is None or metric.name not in side:
            return {}
        column = side[metric.name]
        right = float((column.values * column.weights).sum() / max(column.weights.sum(), 1e-12))
        if right > (1 / self._choices if self._choices > 1 else 0.0):
            return {}
        whose = "reference" if self.reference else "model"
        among = f", {self._choices} possible answers" if self._choices > 1 else ""
        return {
            "chance": f"the {whose} is no better than chance ({100 * right:.1f} % right{among}):"
            " it may be untrained, or the data's labels or preparation not its own"
        }

    def worst_classes(self, labels: tuple[str, ...]) -> tuple[WorstClass, ...]:
        """Classes by label, or by the reference's answer where there are no labels; empty for other tasks."""
        classes = self.classes.get("label", self.classes.get("reference"))
        if classes is None or "candidate" not in self.classes:
            return ()
        names = labels or tuple(str(index) for index in range(int(classes.max()) + 1))
        sides = (self.quality.get("top-1"), self.reference.get("top-1"), self.likeness.get("agreement"))
        return worst_classes(names, classes, *(None if side is None else side.values > 0 for side in sides))


class Pairing:
    """Collects batch by batch, by a task's ``family`` of metrics, and by a metric of one's own."""

    def __init__(self, family: ModuleType, own: OwnMetric | None, worst: int, labels: tuple[str, ...]) -> None:
        self.worst = Worst(worst)
        self._metrics: tuple[Metric, ...] = ((own.metric,) if own else ()) + tuple(family.METRICS)
        self._family, self._own, self._labels = family, own, labels
        self._sides: dict[str, list[Columns]] = {"quality": [], "reference": [], "likeness": []}
        self._classes: dict[str, list[Array]] = {}
        self._unused: set[str] = set()
        self._choices = 0

    @property
    def count(self) -> int:
        """Samples so far."""
        return self.worst.seen

    def add(self, batch: Sequence[Example], outputs: Outputs, reference: Outputs | None, targets: Outputs) -> None:
        """Take in a batch. Raises DataError where targets come and go, or do not fit the metrics."""
        if "logits" in outputs:
            self._choices = outputs["logits"].shape[-1]
        columns = {
            "quality": self._quality(outputs, targets, len(batch)),
            "reference": {} if reference is None else self._quality(reference, targets, len(batch)),
            "likeness": {} if reference is None else self._family.likeness(outputs, reference, targets),
        }
        for name, side in columns.items():
            before = self._sides[name][0].keys() if self._sides[name] else ()
            if self.count and set(before) != set(side):
                raise DataError("some samples have a label and some have none", "label all of them, or none")
            if side:
                self._sides[name].append(side)
        said = self._answers(outputs, reference, targets)
        for name, classes in said.items():
            self._classes.setdefault(name, []).append(classes)
        measured = columns["quality"] | columns["likeness"]
        scores = {m.name: of_samples(m, measured[m.name]) for m in self._metrics if m.name in measured}
        ranks = badness(columns["quality"], columns["reference"], columns["likeness"], self._metrics, len(batch))
        names = {name: [self._name(index) for index in classes.tolist()] for name, classes in said.items()}
        self.worst.add(batch, ranks, scores, names)

    def scores(self) -> Scores:
        """Everything that was collected."""
        classes = {name: np.concatenate(parts) for name, parts in self._classes.items()}
        unused = ""
        if self._unused:
            names, wanted = ", ".join(sorted(self._unused)), ", ".join(self._family.TARGETS)
            unused = f"nothing was judged by the data's {names}: this task is judged by `{wanted}`"
        return Scores(self._metrics, self._sides, classes, self._choices, unused)

    def _quality(self, outputs: Outputs, targets: Outputs, count: int) -> Columns:
        own: dict[str, Column] = {}
        if self._own is not None:
            own[self._own.metric.name] = self._own.column(outputs, targets, count)
        if all(name in targets for name in self._family.TARGETS):
            judged: Columns = self._family.quality(outputs, targets)
            return own | judged
        if self._own is None:
            self._unused.update(targets)
        return own  # there are none, or they are of another kind, for a metric of one's own

    def _answers(self, outputs: Outputs, reference: Outputs | None, targets: Outputs) -> dict[str, Array]:
        """Labels as indices, of classifiers."""
        if "logits" not in outputs or outputs["logits"].ndim != 2:
            return {}
        said = {"label": targets["label"]} if "label" in targets else {}
        said["candidate"] = outputs["logits"].argmax(axis=1)
        if reference is not None:
            said["reference"] = reference["logits"].argmax(axis=1)
        return said

    def _name(self, index: int) -> str:
        return self._labels[index] if index < len(self._labels) else str(index)


def stacked(batch: Sequence[Example]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Feeds and targets of a batch, (n, ...) by name. Raises DataError where not all samples have the same targets."""
    first = batch[0]
    for example in batch:
        if example.targets.keys() != first.targets.keys():
            raise DataError("some samples have a label and some have none", "label all of them, or none")
        for name, target in example.targets.items():
            if target.shape != first.targets[name].shape:
                raise DataError(f"{example.name}: {name!r} has another shape than before it", "give targets one shape")
    feeds = {name: np.stack([example.feeds[name] for example in batch]) for name in first.feeds}
    targets = {name: np.stack([example.targets[name] for example in batch]) for name in first.targets}
    return feeds, targets
