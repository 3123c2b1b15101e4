# SPDX-License-Identifier: Apache-2.0
"""What "as good as the reference" means for each task: one module a family, the same names in each.

| name | what it is |
|---|---|
| `METRICS` | its metrics; the first measured against labels is the one that gates take where none is named |
| `TARGETS` | the targets that answers are judged by; without them there is no quality |
| `quality(outputs, targets)` | how good answers are: columns by metric; needs targets |
| `likeness(outputs, reference, targets)` | how like the reference's they are: columns by metric |

Outputs are arrays (n, ...) by name, targets arrays (n, ...) by name (`calibration.examples`). A column has a value for
each of the n samples and, where samples weigh differently, a weight.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from perceiver_export.calibration.metrics.base import Metric
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.manifest import Manifest

_FAMILIES = {
    "image-classification": "classification",
    "audio-classification": "classification",
    "point-cloud-classification": "classification",
    "text-classification": "classification",
    "fill-mask": "text",
    "optical-flow": "flow",
    "video-autoencoding": "reconstruction",
    "sets": "arrays",
    "arrays": "arrays",
}


def family(manifest: Manifest) -> ModuleType:
    """The module of the bundle's task."""
    name = _FAMILIES[manifest.task]
    if manifest.task == "text-classification" and not manifest.labels:
        name = "arrays"  # scores of several tasks, whose meaning only their owner knows
    return importlib.import_module(f"{__name__}.{name}")


def share_of_right(metrics: tuple[Metric, ...]) -> Metric | None:
    """The share of right answers, if the task has one."""
    return next((m for m in metrics if m.of == "quality" and m.unit == "%" and m.better == "higher"), None)


def find_metric(metrics: tuple[Metric, ...], name: str) -> Metric:
    """The metric of that name. Raises UsageError with the names that the task has."""
    for metric in metrics:
        if metric.name == name:
            return metric
    known = ", ".join(metric.name for metric in metrics)
    raise UsageError(f"the task has no metric {name!r}", f"its metrics: {known}; or your own as module:function")
