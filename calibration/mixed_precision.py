# SPDX-License-Identifier: Apache-2.0
"""Mixed precision that holds a gate: found on one split of the data, certified on another.

1. **Ladder.** What was asked for is the first rung. On each next one a layer goes back, to int8 weights with float
   activations or to float, the step that takes most noise from the outputs first (`calibration.ladder`).
2. **Search.** Rungs 0, 1, 2, 4, … are held against the fp32 bundle on the search split, on each target, and timed there
   in turn with it, up to the first that holds and one more for safety; then halves of what lies below, as long as there
   is time to gain. A rung costs its time as a share of fp32's, of several targets the geometric mean; where weights
   alone are quantized, which is for size, its bytes. One that does not cost at least ``least_gain`` less than a safer
   one is dropped: nobody should risk accuracy for less than that, and less than about 2 % is noise of the clock.
3. **Certify.** On the certification split the rungs that are left are tested in a fixed sequence, the safest first,
   each at 5 %, up to the first that does not hold; the cheapest that held is kept. The order was fixed before a sample
   of this split was seen, so the chance of certifying any rung that is worse than the margin is 5 % in all, not for
   each: a wrong one is only kept if the first wrong one of the sequence passes its own test (Learn then Test,
   Angelopoulos et al., arXiv 2110.01052, section 2.2; the frontier first, the sequence along it, on two splits: Pareto
   Testing, Laufer-Goldshtein et al., arXiv 2210.07913). Several gates and targets must all hold, which makes a wrong
   pass no more likely (Berger, Technometrics 1982).

No split may share samples with another, or with those that ranges were calibrated on.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.calibration.asked import asked_against_fp32
from perceiver_export.calibration.certificate import certify
from perceiver_export.calibration.ladder import Ladder
from perceiver_export.calibration.metrics import family
from perceiver_export.calibration.observe import Report, observe
from perceiver_export.calibration.pipeline import check_numbers, part_options
from perceiver_export.calibration.plan import Scheme
from perceiver_export.calibration.sensitivity import GroupSensitivity
from perceiver_export.calibration.splits import check_splits
from perceiver_export.calibration.trials import Rung, Trials
from perceiver_export.calibration.write import new_bundle, refuse_place
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.certificates import Certificate
from perceiver_export.runtimes.engines.targets import find_target
from perceiver_export.runtimes.errors import DeviceError, UsageError
from perceiver_export.runtimes.presence import choose_target, devices


class Found(msgspec.Struct, frozen=True):
    """What was tried, in the ladder's order, which of it was kept, and the certificates that it has.

    ``ladder`` is the number of rungs that there were, ``ranking`` what each layer costs by itself, the worst first.
    """

    rungs: tuple[Rung, ...]
    kept: int
    certificates: tuple[Certificate, ...]
    ladder: int
    ranking: tuple[GroupSensitivity, ...]
    warnings: tuple[str, ...]


def search(
    bundle: str | os.PathLike[str] | Bundle,
    out: str | os.PathLike[str],
    *,
    calibrate: str | Path,
    search_on: str | Path,
    certify_on: str | Path,
    device: str = "auto",
    scheme: Scheme = "int8",
    samples: int = 128,
    min_coverage: float = 100.0,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    max_metric_change: float | str | None = None,
    metric: str | None = None,
    least_gain: float = 2.0,
    threads: int | None = None,
    overwrite: bool = False,
    allow_overlap: bool = False,
    progress: Report | None = None,
    **wishes: Any,
) -> Found:
    """Write to ``out`` the cheapest mixture whose gates (`validate`'s) are certified, on a target or on ``all``.

    ``scheme``, ``samples``, ``min_coverage`` and ``wishes`` (method, smooth, correct_bias, weight_bits, precision,
    keep_float) are `quantize`'s and hold for every rung: layers start where ``precision`` puts them, and those that are
    kept float are float throughout. ``least_gain``: percent of a safer rung's cost that a riskier one must save.

    A rung with NaN or infinite outputs does not hold. Raises GateError where none holds, UndecidedError where the
    samples are too few to say, BrokenReferenceError where the fp32 bundle gives NaN (nothing is written); UsageError,
    DataError where splits overlap, and what `quantize` and `validate` raise.
    """
    report = progress or (lambda what, done, total: None)
    path = Path(os.path.abspath(out))
    gates = {"max_drop": max_drop, "min_agreement": min_agreement, "max_metric_change": max_metric_change}
    if all(gate is None for gate in gates.values()):
        raise UsageError("a search needs to know what is good enough", "give --max-drop or --min-agreement")
    _check(samples, min_coverage, least_gain, threads)
    refuse_place(path, overwrite, bundle)
    source = open_bundle(bundle)
    options = part_options(source, scheme, **wishes)
    asked_against_fp32(family(source.manifest), **gates, metric=metric)
    targets = search_targets(device, source)
    searched = check_splits(source, calibrate, search_on, certify_on, allow_overlap)
    settings = {"against": source, "against_device": targets[0], "threads": threads, **gates, "metric": metric}
    with tempfile.TemporaryDirectory(prefix="perceiver-export-search-") as folder:
        observation = observe(source, calibrate, samples, threads, report)
        ladder = Ladder(source, observation, options, min_coverage, threads, report)
        trials = Trials(ladder, Path(folder), path.name, targets, settings, scheme == "int8", report)
        order = trials.search(search_on, least_gain / 100)
        kept, evidence = trials.certify(order, certify_on)
        ladder.complete(trials.path(kept))
        made = certify(trials.path(kept), evidence, searched)
        with new_bundle(path, overwrite) as directory:
            shutil.copytree(trials.path(kept), directory, dirs_exist_ok=True)
    steps = sorted(trials.rungs)
    rungs = tuple(trials.rungs[step] for step in steps)
    slow = _slow(trials.rungs[kept])
    return Found(rungs, steps.index(kept), made, len(ladder.rungs), ladder.ranking, slow)


def search_targets(device: str, source: Bundle) -> tuple[str, ...]:
    """The targets that a search runs and times its rungs on. Raises DeviceError: none, or it needs engines built."""
    if device == "all":
        names = [found.target for found in devices()]
    else:
        names = [choose_target(source) if device == "auto" else device]
    here = tuple(name for name in names if not find_target(name).needs_engine)
    if not here:
        said = f"{', '.join(names)} runs engines that take minutes to build" if names else "no target is present"
        raise DeviceError(
            f"{said}: a search, which tries many bundles, does not",
            "search with --device ort-cpu or openvino-cpu, build what it finds, then `validate --device … --certify`",
        )
    return here


def _check(samples: int, min_coverage: float, least_gain: float, threads: int | None) -> None:
    check_numbers(samples, min_coverage, threads)
    if not 0.0 <= least_gain < 100.0:
        raise UsageError(f"least-gain is {least_gain:g}", "it is a percentage of a safer mixture's cost")


def _slow(kept: Rung) -> tuple[str, ...]:
    return tuple(
        f"what was kept is not faster than fp32 on this machine's {time.target}: {time.ratio:.2f} × its time"
        for time in kept.times
        if time.ratio >= 1.0
    )
