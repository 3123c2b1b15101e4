# SPDX-License-Identifier: Apache-2.0
"""``module:function``: your own metric.

The function takes one sample's outputs by name and its targets by name, both without the batch axis, and returns a
number. An array that DATA calls ``label`` or ``labels`` has both names, in the form that the output's kind requires
(`calibration.data`); other arrays that are not inputs keep their names. Higher is better unless the function has
``better = "lower"``; its ``unit`` is shown if it has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from perceiver_export.calibration.data.sources import current_directory_importable, find_function
from perceiver_export.calibration.validation.metrics.base import Column, Columns, Family, Metric, Outputs
from perceiver_export.runtimes.errors import DataError, PerceiverExportError, UsageError
from perceiver_export.runtimes.runtime import Array

_MOST = 1_000  # samples that are all judged for the naive models; of later ones only some are
_FORM = "take (outputs, targets) of one sample, both arrays by name, and return a number"


class Own(Family):
    """Your function as a family of one metric.

    Its naive model is the best of three: always the first sample's outputs, the mean of the first batch's, or zeros.
    Since the function may be slow, naive models are judged on the first 1,000 samples, one in two of the next 1,000,
    one in four of the next 2,000, and so on, each weighted by the samples that it stands for. A naive model for which
    the function fails is left out.
    """

    targets = ()

    def __init__(self, metric: Metric, function: Callable[[dict[str, Array], dict[str, Array]], float]) -> None:
        super().__init__()
        self.metric, self.metrics, self.function = metric, (metric,), function
        self._count = 0
        self._models: dict[str, Outputs] = {}
        self._reads: tuple[str, ...] = ()

    def quality(self, outputs: Outputs, targets: Outputs) -> Columns:
        """Calls the function for each sample. Raises UsageError if it fails, DataError if it returns NaN."""
        rows = range(len(next(iter(outputs.values()))))
        return {self.metric.name: Column.of(np.array([self._value(outputs, targets, row) for row in rows]))}

    def _value(self, outputs: Outputs, targets: Outputs, row: int) -> float:
        # Copies, because the function may change its arguments.
        sides = [{name: np.copy(array[row]) for name, array in side.items()} for side in (outputs, targets)]
        if "label" in sides[1]:
            sides[1].setdefault("labels", sides[1]["label"])
        try:
            with current_directory_importable():  # the function may import modules when it runs
                value = float(self.function(*sides))
        except PerceiverExportError:
            raise
        except (Exception, SystemExit) as error:
            given = "; outputs: {}; targets: {}".format(*(", ".join(side) or "none" for side in sides))
            raise UsageError(f"{self.metric.name} failed: {type(error).__name__}: {error}", _FORM + given) from error
        if not math.isfinite(value):
            raise DataError(f"{self.metric.name} gave {value}", "return a finite number for every sample")
        return value

    def seen(self, outputs: Outputs, targets: Outputs) -> dict[str, Array]:
        """For each naive model, the sums of its values and of their weights, and how often the function failed."""
        if not self._count:
            self._models = {
                "the first sample's outputs": {name: array[:1] for name, array in outputs.items()},
                "the mean of each output": {
                    name: array.mean(axis=0, keepdims=True).astype(array.dtype) for name, array in outputs.items()
                },
                "zeros": {name: np.zeros_like(array[:1]) for name, array in outputs.items()},
            }
            values = self.quality(outputs, targets)[self.metric.name].values
            self._reads = tuple(name for name in outputs if self._depends(name, outputs, targets, values))
        sums = {says: np.zeros(3) for says in self._models}
        for row in range(len(next(iter(outputs.values())))):
            step = 2 ** (self._count // _MOST).bit_length()
            # One in ``step``, spread by the golden ratio, because every second sample may be of the same class.
            if (self._count * 0x9E3779B1 & 0xFFFFFFFF) * step < 2**32:
                for says in self._models:
                    value = self._of_model(says, targets, row)
                    sums[says] += (0, 0, 1) if value is None else (step * value, step, 0)
            self._count += 1
        return sums

    def _of_model(self, says: str, targets: Outputs, row: int) -> float | None:
        try:
            one = {name: array[row : row + 1] for name, array in targets.items()}
            return self._value(self._models[says], one, 0) if self._models[says] else None
        except PerceiverExportError:
            self._models[says] = {}
            return None

    def naive(self, seen: Mapping[str, Any], names: Sequence[str]) -> tuple[str, dict[str, float]]:
        """The best model's mean."""
        found = {says: float(total / weight) for says, (total, weight, failed) in seen.items() if not failed}
        if not found:
            return self.says, {}
        best = (max if self.metric.better == "higher" else min)(found, key=lambda says: found[says])
        return f"always giving {best}", {self.metric.name: found[best]}

    def reads(self, metric: str, outputs: Sequence[str]) -> tuple[str, ...]:
        """The outputs that its values on the first batch depend on."""
        return self._reads

    def _depends(self, name: str, outputs: Outputs, targets: Outputs, values: Array) -> bool:
        """Whether the metric changes or fails if an output is negated, another sample's, or zero."""
        array = outputs[name]
        try:
            return not all(
                np.array_equal(self.quality({**outputs, name: ruined}, targets)[self.metric.name].values, values)
                for ruined in (100 - 3 * array, np.roll(array, 1, axis=0), np.zeros_like(array))
            )
        except PerceiverExportError:
            return True


def load_own(spec: str) -> Own:
    """Import ``module:function``, as seen from the current directory. Raises UsageError."""
    with current_directory_importable():
        function = find_function(spec)
    better: Literal["higher", "lower"] = getattr(function, "better", "higher")
    if better not in ("higher", "lower"):
        raise UsageError(f"{spec} has better = {better!r}", "set it to 'higher' or 'lower'")
    return Own(Metric(spec, "quality", better, "mean", str(getattr(function, "unit", ""))), function)
