# SPDX-License-Identifier: Apache-2.0
"""Families of metrics: one for each kind of output, and one for your own metric."""

from __future__ import annotations

from collections.abc import Sequence

from perceiver_export.calibration.validation.metrics.base import Family, Metric
from perceiver_export.calibration.validation.metrics.classification import MultiLabel, SingleLabel, Text
from perceiver_export.calibration.validation.metrics.own import load_own
from perceiver_export.calibration.validation.metrics.values import Arrays, Flow, Reconstruction, Regression
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.manifest import Manifest, judged_output

_KINDS = {"single-label": SingleLabel, "multi-label": MultiLabel, "regression": Regression}
_TASKS = {"fill-mask": Text, "optical-flow": Flow}
_OF_ALL = ("arrays", "sets")  # tasks whose other outputs are compared too


def families(manifest: Manifest, own: str | None = None) -> tuple[Family, ...]:
    """The families that judge a bundle; the first one decides which answers are right.

    They depend on the task and on the kind of the judged output in the manifest; ``own`` is ``module:function``.
    """
    first: tuple[Family, ...] = () if own is None else (load_own(own),)
    if manifest.task in _TASKS:
        return (*first, _TASKS[manifest.task]())
    found = judged_output(manifest)
    judged: tuple[Family, ...] = () if found is None else (_KINDS[found[1]](found[0]),)
    if manifest.task == "video-autoencoding":
        for label in judged:  # no target tells which label is right, so only likeness counts
            label.metrics = tuple(metric for metric in label.metrics if metric.of == "likeness")
            label.targets, label.telling = None, ()
        return (*first, Reconstruction(), *judged)
    return (*first, *judged, Arrays()) if manifest.task in _OF_ALL or not judged else (*first, *judged)


def metrics_of(judges: Sequence[Family]) -> tuple[Metric, ...]:
    """The metrics of several families; of two with the same name, the first."""
    found: dict[str, Metric] = {}
    for family in judges:
        for metric in family.metrics:
            found.setdefault(metric.name, metric)
    return tuple(found.values())


def share_of_right(metrics: Sequence[Metric]) -> Metric | None:
    """The share of right answers, if the task has one."""
    kinds = ("share", "fraction")
    return next((m for m in metrics if m.of == "quality" and m.kind in kinds and m.better == "higher"), None)


def find_metric(metrics: Sequence[Metric], name: str) -> Metric:
    """The metric of that name. Raises UsageError with the names that exist."""
    for metric in metrics:
        if metric.name == name:
            return metric
    known = ", ".join(metric.name for metric in metrics)
    raise UsageError(f"the task has no metric {name!r}", f"use one of {known}, or your own as module:function")
