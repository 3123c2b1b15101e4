# SPDX-License-Identifier: Apache-2.0
"""``module:function``: a metric of one's own.

The function takes one sample's outputs by name and its targets by name, both without the batch, and gives a number.
More is better unless the function has ``better = "lower"``; ``unit`` is shown if it has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from perceiver_export.calibration.metrics.base import Column, Metric
from perceiver_export.calibration.user_code import current_directory_importable, find_function
from perceiver_export.runtimes.errors import DataError, PerceiverExportError, UsageError
from perceiver_export.runtimes.runtime import Array

_FORM = "it takes (outputs, targets) of one sample, arrays by name, and gives a number"


@dataclass(frozen=True)
class OwnMetric:
    """The user's function, and what it said of itself."""

    metric: Metric
    function: Callable[[dict[str, Array], dict[str, Array]], float]

    def column(self, outputs: Mapping[str, Array], targets: Mapping[str, Array], count: int) -> Column:
        """The function's value for each of ``count`` samples. Raises UsageError where it fails, DataError on NaN."""
        values = []
        for row in range(count):
            sides = [{name: array[row] for name, array in side.items()} for side in (outputs, targets)]
            try:
                with current_directory_importable():  # it may import as it goes
                    value = float(self.function(*sides))
            except PerceiverExportError:
                raise
            except (Exception, SystemExit) as error:
                raise UsageError(f"{self.metric.name} failed: {type(error).__name__}: {error}", _FORM) from error
            if not math.isfinite(value):
                raise DataError(f"{self.metric.name} gave {value}", "a metric gives a finite number for every sample")
            values.append(value)
        return Column.of(np.asarray(values))


def load_own(spec: str) -> OwnMetric:
    """Import ``module:function``, seen from the current directory. Raises UsageError."""
    with current_directory_importable():
        function = find_function(spec)
    better: Literal["higher", "lower"] = getattr(function, "better", "higher")
    if better not in ("higher", "lower"):
        raise UsageError(f"{spec} has better = {better!r}", "it is 'higher' or 'lower'")
    return OwnMetric(Metric(spec, "quality", better, "mean", str(getattr(function, "unit", ""))), function)
