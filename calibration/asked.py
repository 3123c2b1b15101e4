# SPDX-License-Identifier: Apache-2.0
"""What `validate` was asked to gate on, checked before anything runs, and judged after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from perceiver_export.calibration.gates import RELATIVE, Gate, Wanted, at_least, at_most, mean_at_most
from perceiver_export.calibration.metrics import find_metric, share_of_right
from perceiver_export.calibration.metrics.base import Metric
from perceiver_export.calibration.pairing import Scores
from perceiver_export.calibration.scores import estimate, flips, worsening
from perceiver_export.calibration.statistics import Estimate
from perceiver_export.runtimes.errors import DataError, UsageError


@dataclass(frozen=True)
class Asked:
    """The gates. ``change`` is in the metric's unit, or a share of the reference's value if ``relative``."""

    max_drop: float | None = None
    min_agreement: float | None = None
    change: float | None = None
    relative: bool = False
    metric: str | None = None

    @classmethod
    def of(
        cls,
        max_drop: float | None,
        min_agreement: float | None,
        max_metric_change: float | str | None,
        metric: str | None,
    ) -> Asked:
        """As the command line gives them. Raises UsageError where a number makes no sense."""
        text = str(max_metric_change).strip()
        relative = text.endswith("%")
        try:
            change = None if max_metric_change is None else float(text.rstrip("%")) / (100 if relative else 1)
        except ValueError as error:
            raise UsageError(f"--max-metric-change is {text!r}", "give a number, or a share as 2%") from error
        for name, value, most in (
            ("--max-drop", max_drop, 100.0),
            ("--min-agreement", min_agreement, 100.0),
            ("--max-metric-change", change, math.inf),
        ):
            if value is not None and not 0 <= value <= most:
                raise UsageError(
                    f"{name} is {value:g}", f"give a number from 0 to {most:g}" if most < math.inf else "give 0 or more"
                )
        return cls(max_drop, min_agreement, change, relative, metric)

    @property
    def any(self) -> bool:
        """Whether there is a gate at all."""
        return (self.max_drop, self.min_agreement, self.change) != (None, None, None)


def check_asked(asked: Asked, family: ModuleType, has_reference: bool) -> None:
    """Raise UsageError: a gate without a reference, or one that the task cannot have."""
    if asked.any and not has_reference:
        raise UsageError("a gate needs a reference", "give --against BUNDLE or --against CHECKPOINT")
    names = [metric.name for metric in family.METRICS]
    if asked.metric is not None and ":" not in asked.metric:
        find_metric(family.METRICS, asked.metric)
    if asked.max_drop is not None and share_of_right(family.METRICS) is None:
        raise UsageError(
            f"this task has no share of right answers, so --max-drop does not fit it; it has {', '.join(names)}",
            "gate on --max-metric-change, with --metric to say which",
        )
    if asked.min_agreement is not None and "agreement" not in names:
        raise UsageError(
            f"this task has no agreement; it has {', '.join(names)}", "gate on --max-metric-change, with --metric"
        )
    if asked.change is not None and (asked.metric is None or ":" not in asked.metric):
        first = next(metric for metric in family.METRICS if _can_change(metric))
        _check_change(asked, first if asked.metric is None else find_metric(family.METRICS, asked.metric))


def asked_against_fp32(family: ModuleType, **gates: Any) -> Asked:
    """`Asked.of` for those who gate a quantized bundle against the one that it is made from. Raises UsageError."""
    asked = Asked.of(**gates)
    if asked.metric is not None and asked.change is None:
        raise UsageError("--metric has no effect without --max-metric-change", "give both, or neither")
    check_asked(asked, family, has_reference=True)
    return asked


def _check_change(asked: Asked, metric: Metric) -> None:
    """Raise UsageError where a change of this metric makes no sense, or has no bounds."""
    if metric.of == "likeness" and (asked.relative or not _can_change(metric)):
        raise UsageError(
            f"{metric.name} says how alike both are, so it has no change",
            "gate on a distance in its unit (kl, distance, error), or on --min-agreement",
        )
    if asked.relative and metric.kind == "share":
        raise UsageError(
            f"{metric.name} is a share already, and a share of it has no exact bounds",
            "give points: --max-drop, or --max-metric-change without %",
        )


def _can_change(metric: Metric) -> bool:
    """A quality can get worse, a distance can be too large."""
    return metric.of == "quality" or metric.better == "lower"


def judge(asked: Asked, scores: Scores, samples: int) -> tuple[Gate, ...]:
    """The gates that were asked for. Raises DataError where the data has no targets for one."""
    gates = []
    if asked.max_drop is not None:
        gates.append(_drop(asked.max_drop, scores, samples))
    if asked.min_agreement is not None:
        found = estimate(find_metric(scores.metrics, "agreement"), scores.likeness["agreement"])
        what = "lower bound of the agreement with the reference, at least"
        gates.append(at_least(Wanted("--min-agreement", "agreement", what, asked.min_agreement, "%"), found, samples))
    if asked.change is not None:
        gates.append(_change(asked, asked.change, scores, samples))
    return tuple(gates)


def _drop(asked: float, scores: Scores, samples: int) -> Gate:
    metric = share_of_right(scores.metrics)
    if metric is None or metric.name not in scores.quality:
        raise DataError(
            "the data has no labels, so a drop cannot be measured", "add labels, or gate on --min-agreement"
        )
    candidate, reference = scores.quality[metric.name], scores.reference[metric.name]
    found = _times(worsening(metric, candidate, reference), 100.0)
    what = f"upper bound of the fall of {metric.name} below the reference, at most"
    wanted = Wanted("--max-drop", f"{metric.name} drop", what, asked, "points")
    if metric.kind != "share":
        return mean_at_most(wanted, found, samples)
    lost, gained = flips(candidate, reference)
    spread = 100 * math.sqrt(max((lost + gained) / samples - ((lost - gained) / samples) ** 2, 0.0))
    return at_most(wanted, found, samples, spread, room=asked / 100)


def _change(asked: Asked, change: float, scores: Scores, samples: int) -> Gate:
    metric = _judged(asked, scores)
    _check_change(asked, metric)
    scale = 100.0 if metric.unit == "%" or asked.relative else 1.0
    unit = RELATIVE if asked.relative else "points" if metric.unit == "%" else metric.unit
    option = f"--metric {metric.name} --max-metric-change" if asked.metric else "--max-metric-change"
    if metric.of == "likeness":
        found = estimate(metric, scores.likeness[metric.name])
        subject, what = metric.name, f"upper bound of {metric.name}, at most"
    else:
        found = worsening(metric, scores.quality[metric.name], scores.reference[metric.name], asked.relative)
        subject = f"worsening of {metric.name}"
        what = f"upper bound of the {subject}, at most"
    limit = change * (100.0 if asked.relative else 1.0)
    return mean_at_most(Wanted(option, subject, what, limit, unit), _times(found, scale), samples)


def _judged(asked: Asked, scores: Scores) -> Metric:
    """The metric that was named; else the first quality that was measured, else the first distance."""
    measured = scores.quality.keys() | scores.likeness.keys()
    if asked.metric is not None:
        metric = find_metric(scores.metrics, asked.metric)
        if metric.name not in measured:
            raise DataError(f"{metric.name} was not measured", "the data has no targets for it")
        return metric
    for metric in scores.metrics:
        if metric.name in measured and _can_change(metric):
            return metric
    raise DataError("nothing was measured that could change", "add targets to the data")


def _times(found: Estimate, scale: float) -> Estimate:
    return Estimate(*(float(scale * np.float64(value)) for value in (found.value, found.lower, found.upper)))
