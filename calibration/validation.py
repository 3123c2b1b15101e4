# SPDX-License-Identifier: Apache-2.0
"""How good a bundle is on data, and how close to a reference: both on the same inputs, paired sample by sample."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from perceiver_export.calibration.asked import Asked, check_asked, judge
from perceiver_export.calibration.data_report import Bounds, out_of_range, widen
from perceiver_export.calibration.directories import check_new_directory
from perceiver_export.calibration.examples import Example, digest_of, open_examples
from perceiver_export.calibration.metrics import family
from perceiver_export.calibration.metrics.own import load_own
from perceiver_export.calibration.overlap import calibrated_on, check_overlap, fingerprint
from perceiver_export.calibration.pairing import Pairing, stacked
from perceiver_export.calibration.references import check_reference, doubts
from perceiver_export.calibration.sides import Reference, Side, check_alike, open_side, run_side, side_of
from perceiver_export.calibration.statistics import mcnemar
from perceiver_export.calibration.validated import Data, Failure, Validation
from perceiver_export.calibration.worst_files import OPTION, write_worst
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.errors import BrokenReferenceError, DataError, GateError, UsageError
from perceiver_export.runtimes.machine import available_cores, cpu_features, cpu_name
from perceiver_export.runtimes.tasks import open_task
from perceiver_export.runtimes.tasks.base import Task

# Samples handed on at a time; a bundle of another batch size cuts them as it needs. Two engines' waiting threads are in
# each other's way at every change from one to the other, so fast models change seldom.
_BATCH, _LARGEST_BATCH, _SECONDS = 64, 512, 0.5
# Kinds of warnings that a gate which holds may not be shown without: few samples its bounds know of already.
_RESERVATIONS = ("overlap", "repeated", "range", "itself", "quantized", "one label", "chance")

Progress = Callable[[int, int | None], None]


def validate(
    bundle: str | os.PathLike[str] | Bundle,
    data: str | Path,
    *,
    against: str | os.PathLike[str] | Bundle | Reference | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    max_metric_change: float | str | None = None,
    metric: str | None = None,
    samples: int | None = None,
    device: str = "auto",
    against_device: str | None = None,
    precision: Precision | None = None,
    threads: int | None = None,
    allow_overlap: bool = True,
    certifying: bool = False,
    keep_failures: bool = False,
    worst: int = 12,
    save_worst: str | Path | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Run a bundle, and its reference, over DATA (`calibration.examples`), both on the same inputs.

    ``against`` is another bundle, on the same target unless ``against_device`` is given, the same bundle on another, or
    a function from inputs to outputs by name (a torch model, say). ``precision`` is that of the bundle's engine, as in
    `load`. ``max_drop`` (points) is held against the one-sided exact 95 % upper bound of the paired
    fall of the share of right answers, ``min_agreement`` (percent) against the lower bound of the share of samples
    with the same answer, ``max_metric_change`` against the upper bound of the worsening of ``metric`` (one of the
    task's, or ``module:function``), in its unit or, as "2%", relative to the reference. The gates are in the result;
    `Validation.require` raises where one does not hold. ``samples`` stops after so many. The ``worst`` samples are
    listed, and saved with the classes in the new directory ``save_worst``. Samples that the bundle was calibrated on
    are warned of; with ``allow_overlap`` False, as a certificate needs it, they are refused. ``certifying`` refuses,
    before anything runs, a reference that no certificate can rest on.

    Raises DataError, UsageError, BundleError and what `load` raises; GateError where an output is NaN or infinite, or
    with ``keep_failures`` gives a result that says so, which `Validation.require` raises.
    """
    asked = Asked.of(max_drop, min_agreement, max_metric_change, metric)
    if samples is not None and samples < 1:
        raise UsageError(f"samples is {samples}", "give 1 or more, or leave it out")
    if callable(against) and against_device is not None:
        raise UsageError("a checkpoint runs in torch, and on no target", "leave --against-device out")
    if against is None and against_device is not None:
        against = bundle
    if save_worst is not None:
        check_new_directory(Path(save_worst), OPTION, DataError)
    own = load_own(asked.metric) if asked.metric is not None and ":" in asked.metric else None
    with open_task(bundle, device, threads, precision=precision) as task:
        measures = family(task.manifest)
        check_asked(asked, measures, against is not None)
        opened = open_examples(task, data)
        stream = itertools.islice(opened.stream, samples)
        total = opened.count if samples is None or opened.count is None else min(samples, opened.count)
        pairing = Pairing(measures, own, worst, task.manifest.labels)
        candidate = side_of(task)
        # What `auto` takes may differ from bundle to bundle, and the target is none of what is compared.
        other = against_device or str(candidate.engine["target"])
        with open_side(against, other, threads, beside=task) as reference:
            if certifying:
                check_reference(candidate.engine, None if reference is None else reference.engine)
            try:
                inputs, judged, bounds = _go(pairing, candidate, reference, stream, total, progress)
            except GateError as error:
                if not keep_failures:
                    raise
                return _failed(task, candidate, reference, Data(str(data), pairing.count, ""), error)
        doubted = check_overlap(inputs, calibrated_on(bundle), str(data), allow_overlap)
        if strange := out_of_range(task.manifest, bounds):
            doubted["range"] = "; ".join(strange)
        measured = Data(str(data), pairing.count, fingerprint(judged))
        result = _result(task, candidate, reference, measured, pairing, asked, doubted)
    if save_worst is not None:
        write_worst(Path(save_worst), result.worst_samples, pairing.worst.examples(), result.worst_classes)
    return result


def _go(
    pairing: Pairing,
    candidate: Side,
    reference: Side | None,
    stream: Iterable[Example],
    total: int | None,
    progress: Progress | None,
) -> tuple[list[str], list[str], Bounds]:
    """All samples through both sides; gives the digest of each one's inputs, and of inputs and targets, and the inputs'
    bounds.
    """
    inputs: list[str] = []
    judged: list[str] = []
    bounds: Bounds = {}
    samples, size = iter(stream), _BATCH
    while batch := list(itertools.islice(samples, size)):
        start = time.perf_counter()
        inputs += [example.digest for example in batch]
        judged += [example.digest + digest_of(example.targets) for example in batch]
        feeds, targets = stacked(batch)
        widen(bounds, feeds)
        # The reference first: of a sample that breaks both it is the reference that must be mended.
        expected = None if reference is None else run_side(reference, feeds, batch, is_reference=True)
        outputs = run_side(candidate, feeds, batch)
        if reference is not None and expected is not None:
            check_alike(reference, expected, outputs)
        pairing.add(batch, outputs, expected, targets)
        if time.perf_counter() - start < _SECONDS:
            size = min(2 * size, _LARGEST_BATCH)
        if progress is not None:
            progress(pairing.count, total)
    if not pairing.count:
        raise DataError("the data holds no samples", "it is empty, or a generator that was used up")
    return inputs, judged, bounds


def _result(
    task: Task,
    candidate: Side,
    reference: Side | None,
    data: Data,
    pairing: Pairing,
    asked: Asked,
    doubted: dict[str, str],
) -> Validation:
    scores = pairing.scores()
    metrics = scores.results()
    doubted = doubted | doubts(candidate.engine, None if reference is None else reference.engine)
    warnings = doubted | scores.warnings(data.samples, len(task.manifest.labels))
    reservations = tuple(warnings[kind] for kind in _RESERVATIONS if kind in warnings)
    paired = next((result for result in metrics if result.lost is not None), None)
    return Validation(
        task.manifest.task,
        candidate.described,
        None if reference is None else reference.described,
        data,
        metrics,
        None if paired is None else mcnemar(paired.lost or 0, paired.gained or 0),
        tuple(msgspec.structs.replace(gate, reservations=reservations) for gate in judge(asked, scores, data.samples)),
        tuple(warnings.values()),
        pairing.worst.samples(),
        scores.worst_classes(task.manifest.labels),
        machine(),
        tuple(warnings),
    )


def _failed(task: Task, candidate: Side, reference: Side | None, data: Data, error: GateError) -> Validation:
    """What is known where a side gave NaN."""
    return Validation(
        task.manifest.task,
        candidate.described,
        None if reference is None else reference.described,
        data,
        metrics=(),
        mcnemar=None,
        gates=(),
        warnings=(),
        worst_samples=(),
        worst_classes=(),
        machine=machine(),
        failure=Failure(error.message, error.hint, isinstance(error, BrokenReferenceError)),
    )


def machine() -> dict[str, str]:
    """What a measured number belongs to."""
    return {
        "cpu": cpu_name(),
        "cores": str(available_cores()),
        "instruction set": " ".join(cpu_features()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
