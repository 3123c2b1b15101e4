# SPDX-License-Identifier: Apache-2.0
"""`validate`: how good a bundle is on data and how close to a reference, paired sample by sample."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from perceiver_export.calibration.bundles import check_new_directory, new_directory
from perceiver_export.calibration.data.fingerprints import DataWatch, calibrated_on, check_overlap, fingerprint
from perceiver_export.calibration.data.samples import Notes, Samples, stack
from perceiver_export.calibration.validation.certify import check_certifiable
from perceiver_export.calibration.validation.gates import check_gates, judge, settled, too_wide, unread
from perceiver_export.calibration.validation.metrics import families
from perceiver_export.calibration.validation.options import ValidateOptions
from perceiver_export.calibration.validation.reference import (
    Side,
    check_reference,
    doubts,
    open_side,
    run_sides,
    side_of,
)
from perceiver_export.calibration.validation.results import Data, Failure, Validation
from perceiver_export.calibration.validation.scores import Scores
from perceiver_export.calibration.validation.sequential import ANYTIME
from perceiver_export.calibration.validation.statistics import FIXED, mcnemar, scipy_stats
from perceiver_export.calibration.validation.worst import OPTION, write_worst
from perceiver_export.runtimes.bundle import BundleLike
from perceiver_export.runtimes.errors import BrokenReferenceError, DataError, DeviceError, GateError, check_kind
from perceiver_export.runtimes.machine import available_cores, cpu_features, cpu_name
from perceiver_export.runtimes.manifest import assumed_note
from perceiver_export.runtimes.presence import devices
from perceiver_export.runtimes.tasks import open_task

# Samples per batch; a bundle of another batch size splits them. The waiting threads of two engines disturb each other
# whenever the engine changes, so fast models get large batches.
_BATCH, _LARGEST_BATCH, _SECONDS = 64, 512, 0.5
# Warnings that bounds account for, or that concern no gate.
_NO_RESERVATIONS = ("few", "unused", "unlabelled", "unlisted")

Progress = Callable[[int, int | None], None]


@dataclass
class Measured:
    """The scores of both sides on the samples, and everything else that `judged` reads.

    ``found`` has no metrics or gates yet. ``total``: the number of samples of all shards; ``rows``: the SHA-256 of
    their names and contents.
    """

    found: Validation
    scores: Scores
    watch: DataWatch
    notes: Notes
    total: int = 0
    rows: str = ""


def validate(
    bundle: BundleLike,
    data: str | Path,
    options: ValidateOptions = ValidateOptions(),
    *,
    progress: Progress | None = None,
) -> Validation:
    """Run a bundle and its reference over DATA (`calibration.data`), both on the same inputs.

    Gates on drops and agreement of single answers use exact one-sided 95 % bounds, all others use bootstrap bounds.
    `Validation.require` raises if a gate does not hold. ``progress(done, total)`` is called after each batch.

    Raises DataError, UsageError, BundleError and the errors of `load`; GateError if an output is NaN or infinite;
    MissingDependencyError without scipy.
    """
    check_kind("options", options, ValidateOptions, "ValidateOptions(gates=Gates(…), …)")
    if options.certify:
        check_certifiable(bundle)
    measured = measure(bundle, data, options, progress)
    if measured.found.failure is not None:
        return measured.found
    found = judged(bundle, measured, options)
    if options.save_worst is not None:
        worst = [example for _, _, example in measured.scores.worst.kept if example is not None]
        write_worst(Path(options.save_worst), found.worst_samples, worst, found.worst_classes)
    return found


def measure(
    bundle: BundleLike,
    data: str | Path,
    options: ValidateOptions,
    progress: Progress | None = None,
    shard: tuple[int, int] = (1, 1),
) -> Measured:
    """Run both sides over the data, or over shard i of n (`Samples`). Raises the errors of `validate`."""
    against = options.against or (bundle if options.against_device is not None else None)
    scipy_stats()
    if options.save_worst is not None:
        check_new_directory(Path(options.save_worst), OPTION, DataError)
    opened = open_task(bundle, options.device, options.threads, precision=options.precision, truncate=options.truncate)
    with opened as task, contextlib.ExitStack() as stack:
        manifest, bounds = task.manifest, ANYTIME if options.sequential else FIXED
        scores = Scores(families(manifest, options.gates.own), options.worst, manifest.labels, bounds)
        check_gates(options.gates, scores.metrics, against is not None, options.sequential)
        seed, tokenizer = options.seed if options.sequential else None, getattr(task, "tokenizer", None)
        examples = Samples(data, manifest, options.samples, True, tokenizer, shard, seed)
        candidate, watch = side_of(task), DataWatch(manifest, str(data))
        # `auto` may choose different targets for the two bundles, but targets are not compared.
        other = options.against_device or str(candidate.described["target"])
        reference = stack.enter_context(open_side(against, other, options.threads, beside=task))
        described = None if reference is None else reference.described
        if options.certify:
            check_reference(candidate.described, described)
        found = Validation(manifest.task, candidate.described, described, Data(watch.source, 0, ""), machine=machine())
        try:
            _compare(candidate, reference, examples, scores, watch, options, progress)
        except GateError as error:
            if not options.keep_failures:
                raise
            failure = Failure(error.message, error.hint, isinstance(error, BrokenReferenceError))
            found = msgspec.structs.replace(found, data=Data(watch.source, scores.count, ""), failure=failure)
    return Measured(found, scores, watch, examples.notes, examples.total, examples.rows)


def _compare(
    candidate: Side,
    reference: Side | None,
    examples: Samples,
    scores: Scores,
    watch: DataWatch,
    options: ValidateOptions,
    progress: Progress | None,
) -> None:
    """Run all samples through both sides; in a sequential run, until the gates are decided."""
    size = _BATCH
    while batch := list(itertools.islice(examples.stream, size)):
        start = time.perf_counter()
        for example in batch:
            watch.see(example)
        outputs, expected = run_sides(candidate, reference, stack(batch), batch)
        scores.add(batch, outputs, expected, stack(batch, "targets"))
        if progress is not None:
            progress(scores.count, examples.count)
        if options.sequential:
            if settled(options.gates, scores):
                break
        elif time.perf_counter() - start < _SECONDS:
            size = min(2 * size, _LARGEST_BATCH)
    if not scores.count:
        raise DataError("the data contains no samples", "check that it is not empty or a generator that was used up")


def judged(bundle: BundleLike, measured: Measured, options: ValidateOptions) -> Validation:
    """The result with metrics, gates and their reservations.

    Raises DataError if samples are repeated or were used for calibration, and no option allows that.
    """
    found, scores, watch, gates = measured.found, measured.scores, measured.watch, options.gates
    allowed = options.allow_overlap or not options.certify
    warnings = check_overlap(watch.digests, calibrated_on(bundle), watch.source, allowed)
    warnings |= _doubts_of_data(watch, measured.notes) | doubts(found.candidate, found.reference)
    gates_judged, results = judge(gates, scores), scores.results()
    warnings |= scores.warnings() | too_wide(gates_judged) | unread(gates, scores)
    reservations = tuple(said for kind, said in warnings.items() if kind not in _NO_RESERVATIONS)
    flips = next(((result.lost, result.gained) for result in results if result.lost is not None), None)
    order = ""
    if options.sequential:
        flips = None  # McNemar's p-value holds for a number of samples that was fixed in advance
        count, whole = scores.count, measured.notes.count
        taken = f"took all {count:,}" if count == whole else f"stopped after {count:,} of {whole:,}"
        order = f"{taken} samples in the order of seed {options.seed}"
    data = Data(watch.source, scores.count, fingerprint(watch.judged), dict(sorted(watch.labels.items())), order)
    return msgspec.structs.replace(
        found,
        data=data,
        metrics=results,
        mcnemar=None if flips is None else mcnemar(flips[0], flips[1] or 0),
        gates=tuple(msgspec.structs.replace(gate, reservations=reservations) for gate in gates_judged),
        warnings=tuple(warnings.values()),
        worst_samples=scores.worst.samples(),
        worst_classes=scores.worst_classes(),
        warning_kinds=tuple(warnings),
    )


def _doubts_of_data(watch: DataWatch, notes: Notes) -> dict[str, str]:
    """Warnings by kind about the data, and about how it was read."""
    seen, known = len(watch.labels), len(watch.manifest.labels)
    few = 1 < seen < min(known, len(watch.digests))
    found = {
        "range": "; ".join(watch.out_of_range()),
        **notes.by_kind(),
        "assumed": assumed_note(watch.manifest),
        "unseen": f"the data has samples of {seen:,} of the model's {known:,} labels" if few else "",
    }
    return {kind: said for kind, said in found.items() if said}


def machine() -> dict[str, str]:
    """The facts about this machine that measured numbers depend on."""
    return {
        "cpu": cpu_name(),
        "cores": str(available_cores()),
        "instruction set": " ".join(cpu_features()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def validate_targets(
    bundle: BundleLike,
    data: str | Path,
    options: ValidateOptions = ValidateOptions(device="all"),
    *,
    progress: Progress | None = None,
) -> tuple[Validation, ...]:
    """`validate` on one target, or with the device ``all`` on each that is present, all against the same reference.

    With ``all``, ``save_worst`` gets one folder per target. Raises the errors of `validate`, and DeviceError if no
    target is present.
    """
    if options.device != "all":
        return (validate(bundle, data, options, progress=progress),)
    present = [device.target for device in devices()]
    if not present:
        raise DeviceError("no target is present", "run `perceiver-export doctor` to see what is missing")
    if options.against is not None and not callable(options.against) and options.against_device is None:
        options = dataclasses.replace(options, against_device=present[0])
    with contextlib.ExitStack() as stack:
        folder = options.save_worst and stack.enter_context(new_directory(Path(options.save_worst), OPTION, DataError))
        places = {target: Path(folder) / target if folder else None for target in present}
        each = [dataclasses.replace(options, device=target, save_worst=place) for target, place in places.items()]
        return tuple(validate(bundle, data, one, progress=progress) for one in each)
