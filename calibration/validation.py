# SPDX-License-Identifier: Apache-2.0
"""How right a bundle is on labelled data, and how often it says what its reference says."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from perceiver_export.calibration.data import Sample, open_data
from perceiver_export.calibration.statistics import Proportion, proportion
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import DataError, GateError, UnsupportedModelError, UsageError
from perceiver_export.runtimes.preprocessing import ImagePreprocessing
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks import open_task
from perceiver_export.runtimes.tasks.image_classification import ImageClassification

# A reference that is not a bundle: preprocessed inputs (n, 3, height, width) -> logits (n, labels).
Reference = Callable[[Array], Array]

_BATCH = 64  # samples handed on at a time; a bundle of another batch size cuts it as it needs


class Gate(msgspec.Struct, frozen=True):
    """One thing that was asked for, and whether it held."""

    what: str
    asked: float
    measured: float
    held: bool

    def __str__(self) -> str:
        return f"{'held' if self.held else 'NOT HELD'}: {self.what} {self.asked:g}, measured {self.measured:.2f}"


class Validation(msgspec.Struct, frozen=True):
    """What was measured. Fields that need labels or a reference are None without them; ``drop`` is in points."""

    samples: int
    top1: Proportion | None
    reference_top1: Proportion | None
    drop: float | None
    agreement: Proportion | None
    gates: tuple[Gate, ...]

    def require(self) -> None:
        """Raise GateError unless every gate held."""
        for gate in self.gates:
            if not gate.held:
                raise GateError(
                    str(gate),
                    "the bundle is not as close to its reference as was asked, or the samples are too few to show it",
                )


def validate(
    bundle: str | os.PathLike[str] | Bundle,
    data: str | Path,
    *,
    against: str | os.PathLike[str] | Bundle | Reference | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    samples: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Validation:
    """Run a bundle, and its reference, over DATA (`calibration.data`), both on the same preprocessed inputs.

    ``against`` is another bundle or a function from inputs to logits (a torch model, say). ``max_drop`` bounds the
    measured fall of top-1 below the reference's, in points; ``min_agreement`` bounds from below the lower exact 95 %
    bound of the share of samples with the same top-1, in percent. The gates are in the result; `Validation.require`
    raises where one does not hold. ``samples`` stops after so many.

    Raises DataError, UsageError, BundleError and what `load` raises; GateError where an output is NaN or infinite.
    """
    if against is None and (max_drop is not None or min_agreement is not None):
        raise UsageError("a gate needs a reference", "give --against BUNDLE or --against CHECKPOINT")
    if samples is not None and samples < 1:
        raise UsageError(f"samples is {samples}", "give 1 or more, or leave it out")
    with _open_classifier(bundle, device, threads) as task:
        opened = open_data(data, task.labels)
        total = opened.count if samples is None or opened.count is None else min(samples, opened.count)
        if against is None or callable(against):
            return _validate(
                task, against, itertools.islice(opened.samples, samples), total, max_drop, min_agreement, progress
            )
        with _open_classifier(against, device, threads) as other:
            _check_same(task, other)
            return _validate(
                task,
                other.run_inputs,
                itertools.islice(opened.samples, samples),
                total,
                max_drop,
                min_agreement,
                progress,
            )


def _open_classifier(bundle: str | os.PathLike[str] | Bundle, device: str, threads: int | None) -> ImageClassification:
    task = open_task(bundle, device, threads)
    if not isinstance(task, ImageClassification):
        task.close()
        raise UnsupportedModelError(
            f"this version validates image classifiers, the bundle is of {task.manifest.task}",
            "compare the outputs of `perceiver-export run` with your own reference",
        )
    return task


def _validate(
    task: ImageClassification,
    reference: Reference | None,
    stream: Iterable[Sample],
    total: int | None,
    max_drop: float | None,
    min_agreement: float | None,
    progress: Callable[[int, int | None], None] | None,
) -> Validation:
    labels, found, expected = [], [], []
    for batch in _batches(stream, _BATCH):
        inputs = np.stack([_input(task, sample) for sample in batch])
        found.append(_best(task.run_inputs(inputs), batch, "the bundle"))
        if reference is not None:
            expected.append(_best(reference(inputs), batch, "the reference"))
        labels += [sample.label for sample in batch]
        if progress is not None:
            progress(len(labels), total)
    if not labels:
        raise DataError("the data holds no samples", "it is empty, or a generator that was used up")
    return _result(
        labels, np.concatenate(found), np.concatenate(expected) if expected else None, max_drop, min_agreement
    )


def _result(
    labels: list[int | None], found: Array, expected: Array | None, max_drop: float | None, min_agreement: float | None
) -> Validation:
    count = len(labels)
    labelled = None not in labels
    if not labelled and any(label is not None for label in labels):
        raise DataError("some samples have a label and some have none", "label all of them, or none")
    truth = np.asarray(labels) if labelled else None
    top1 = None if truth is None else proportion(int((found == truth).sum()), count)
    reference = None if truth is None or expected is None else proportion(int((expected == truth).sum()), count)
    drop = 100 * (reference.value - top1.value) if reference is not None and top1 is not None else None
    agreement = None if expected is None else proportion(int((found == expected).sum()), count)
    gates = []
    if max_drop is not None:
        if drop is None:
            raise DataError(
                "the data has no labels, so a drop cannot be measured", "add labels, or gate on --min-agreement"
            )
        gates.append(Gate("fall of top-1 below the reference, in points, at most", max_drop, drop, drop <= max_drop))
    if min_agreement is not None and agreement is not None:
        low = 100 * agreement.low
        gates.append(
            Gate(
                "lower 95 % bound of the agreement with the reference, in percent, at least",
                min_agreement,
                low,
                low >= min_agreement,
            )
        )
    return Validation(count, top1, reference, drop, agreement, tuple(gates))


def _input(task: ImageClassification, sample: Sample) -> Array:
    image = sample.image
    if isinstance(image, Path) or image.dtype == np.uint8:
        return task.preprocess(image)
    shape = task.runtime.inputs[0].shape[1:]
    if image.dtype != np.float32 or image.shape != shape:
        raise DataError(
            f"{sample.name} is {image.dtype} with shape {list(image.shape)}",
            f"give uint8 pictures, or float32 {list(shape)} as the model takes it",
        )
    if not np.isfinite(image).all():
        raise DataError(f"{sample.name} holds NaN or infinite values", "mend the data")
    return image


def _best(logits: Array, batch: list[Sample], whose: str) -> Array:
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        name = batch[int(np.argmax(bad))].name
        raise GateError(f"{whose} gives NaN or infinite values for {name}", "such a model must not be shipped")
    best: Array = logits.argmax(axis=1)
    return best


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _check_same(task: ImageClassification, other: ImageClassification) -> None:
    if task.labels != other.labels:
        raise UsageError("the two bundles have different labels", "compare bundles of one checkpoint")
    steps: tuple[ImagePreprocessing, ImagePreprocessing] = (task.preprocessing, other.preprocessing)
    if steps[0] != steps[1]:
        raise UsageError(
            "the two bundles prepare pictures differently", "compare bundles of one checkpoint, exported at one --shape"
        )
