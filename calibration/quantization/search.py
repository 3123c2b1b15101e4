# SPDX-License-Identifier: Apache-2.0
"""`search()` finds a mixture of precisions whose gates hold on one split of the data, and certifies it on another.

1. **Candidates.** Candidate 0 has the requested options. Each next one returns one more layer to a higher precision.
   The code calls a candidate a rung, and all of them the ladder.
2. **Search.** Candidates 0, 1, 2, 4, … are tried until one holds, then one more for safety. Below the first that held,
   bisection continues as long as there is time to gain. On each target, a candidate runs in its own fastest precision
   (int8, or int8 with bf16). It is timed alternately with the fp32 bundle in that bundle's fastest precision, and
   compared with the fp32 bundle on the search split. Its cost is the ratio of the two times, the geometric mean over
   targets. If only weights are quantized, or size was requested, the cost is the size in bytes. Two kinds are dropped:
   those that do not cost at least ``least_gain`` less than a safer one (less than about 2 % is clock noise), and those
   that are not faster than the float bundle by more than the spread (or not smaller).
3. **Certify.** On the certification split, the remaining candidates are tested in a fixed sequence, safest first, each
   at 5 %, until one does not hold; the cheapest that held is kept. The order was fixed before any sample of this split
   was seen, so the chance of certifying any candidate that is worse than the margin is 5 % in total (Learn then Test,
   Angelopoulos et al., arXiv 2110.01052, section 2.2; the frontier first, the sequence along it, on two splits: Pareto
   Testing, Laufer-Goldshtein et al., arXiv 2210.07913). All gates must hold on all targets, which makes a wrong pass no
   more likely (Berger, Technometrics 1982).

No split may share samples with another, or with the calibration samples.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.calibration.bundles import absolute_place, copy_tree, new_bundle, refuse_place
from perceiver_export.calibration.data.fingerprints import check_splits
from perceiver_export.calibration.quantization.options import QuantizeOptions, Scheme
from perceiver_export.calibration.quantization.pipeline import check_options, complete_record
from perceiver_export.calibration.quantization.record import GroupSensitivity
from perceiver_export.calibration.quantization.sensitivity import Ladder
from perceiver_export.calibration.quantization.statistics import Report, observe
from perceiver_export.calibration.validation.certify import certify
from perceiver_export.calibration.validation.options import ValidateOptions, check_percent
from perceiver_export.calibration.validation.results import Validation
from perceiver_export.calibration.validation.validation import validate
from perceiver_export.runtimes.benchmark import Bench, bench
from perceiver_export.runtimes.bundle import Bundle, BundleLike, open_bundle
from perceiver_export.runtimes.certificates import Certificate, precision_of
from perceiver_export.runtimes.engines.backend import Precision, find_target
from perceiver_export.runtimes.errors import DeviceError, GateError, UndecidedError, UsageError, VacuousGateError
from perceiver_export.runtimes.presence import choose_target, devices
from perceiver_export.runtimes.tasks.tokenizers import truncating

_RUNS = 40
_TRIES = 3  # to find the float bundle's fastest precision


class Time(msgspec.Struct, frozen=True):
    """Median milliseconds of a call on a target, in an engine of ``precision``. ``ratio`` is relative to the fp32
    bundle in its fastest precision there, ``against``: the median over pairs of alternating blocks, with quartiles.
    ``unsteady``: why the times are too unsteady to compare.
    """

    target: str
    milliseconds: float
    ratio: float
    quartiles: tuple[float, float]
    against: Precision
    unsteady: str = ""
    precision: Precision = "fp32"

    @property
    def faster(self) -> bool:
        """Whether it is faster by more than the spread of the ratios."""
        return self.quartiles[1] < 1 and not self.unsteady

    def __str__(self) -> str:
        low, high = self.quartiles
        why = f", too unsteady to compare: {self.unsteady}" if self.unsteady else ""
        own = "" if self.precision == "fp32" else f" with {self.precision}"
        return f"{self.ratio:.2f} × the time of {self.against} on {self.target}{own} ({low:.2f} to {high:.2f}){why}"


class Rung(msgspec.Struct, frozen=True):
    """A candidate: its number (``step``), the layers at a higher precision, its cost, the outcome of the gates.

    ``size`` is the bundle's as a share of fp32's. ``search`` and ``certification`` have a line for each gate and
    target, or one that begins with "failed" if an output was NaN or infinite.
    """

    step: int
    precision: dict[str, Scheme]
    times: tuple[Time, ...]
    size: float
    search: tuple[str, ...]
    certification: tuple[str, ...] = ()

    @property
    def time(self) -> float:
        """The time as a share of the fastest float's, the geometric mean over targets."""
        return math.exp(sum(math.log(time.ratio) for time in self.times) / len(self.times))


class Found(msgspec.Struct, frozen=True):
    """The candidates that were tried (``rungs``, by number), the index of the one kept, and its certificates.

    ``ladder`` is the number of all candidates; ``ranking`` has the cost of each layer by itself, the worst first.
    """

    rungs: tuple[Rung, ...]
    kept: int
    certificates: tuple[Certificate, ...]
    ladder: int
    ranking: tuple[GroupSensitivity, ...]
    warnings: tuple[str, ...]


def search(
    bundle: BundleLike,
    output: str | os.PathLike[str],
    options: QuantizeOptions = QuantizeOptions(),
    *,
    calibrate: str | Path,
    search_on: str | Path,
    certify_on: str | Path,
    device: str = "auto",
    least_gain: float = 2.0,
    for_size: bool = False,
    allow_overlap: bool = False,
    progress: Report | None = None,
) -> Found:
    """Write the cheapest mixture whose gates are certified to ``output``; ``device`` is a target or ``all``.

    ``options`` apply to every candidate: layers start in the scheme that ``precision`` names, and layers in
    ``keep_float`` stay float. ``least_gain``: percent of a safer candidate's cost that a riskier one must save.
    ``for_size``: the cost is size, as it is if only weights are quantized, and a mixture need not be faster than float.

    A candidate with NaN or infinite outputs does not hold. Nothing is written if this raises: GateError if none holds,
    or none that holds is faster (or smaller); UndecidedError if there are too few samples; BrokenReferenceError if the
    fp32 bundle gives NaN; DataError if splits overlap; UsageError; and the errors of `quantize` and `validate`.
    """
    report = progress or (lambda what, done, total: None)
    path, source = absolute_place(output), open_bundle(bundle)
    check_percent("--least-gain", least_gain, below=0.99)
    if least_gain == 100:
        raise UsageError("--least-gain is 100, but every mixture costs something", "give less; the default is 2")
    check_options(options, source)
    if not options.gates.any:
        raise UsageError("a search needs at least one gate", "give --max-drop or --min-agreement")
    refuse_place(path, options.overwrite, source)
    targets = search_targets(device, source)
    reading = truncating(source) if options.truncate else source
    searched = check_splits(reading, calibrate, search_on, certify_on, allow_overlap)
    with tempfile.TemporaryDirectory(prefix="perceiver-export-search-") as folder:
        observation = observe(source, calibrate, options, report)
        ladder = Ladder(source, observation, options, report)
        trials = Trials(ladder, source, options, targets, Path(folder), path.name, report, for_size)
        order = trials.search(search_on, least_gain / 100)
        kept, evidence = trials.certify(order, certify_on)
        complete_record(source, observation, trials.path(kept), options.threads, ladder.ranking)
        made = certify(trials.path(kept), evidence, searched)
        with new_bundle(path, options.overwrite) as directory:
            copy_tree(trials.path(kept), directory)
    return trials.found(kept, made)


def search_targets(device: str, source: Bundle) -> tuple[str, ...]:
    """The targets on which a search runs and times its rungs. Raises DeviceError if none runs without built engines."""
    names = [choose_target(source) if device == "auto" else device]
    if device == "all":
        names = [found.target for found in devices()]
    here = tuple(name for name in names if not find_target(name).needs_engine)
    if not here:
        said = f"{', '.join(names)} runs engines that take minutes to build" if names else "no target is present"
        raise DeviceError(
            f"{said}; a search tries many bundles and cannot build an engine for each",
            "search with --device ort-cpu or openvino-cpu, build the result, then `validate --device … --certify`",
        )
    return here


def climb(count: int, holds: Callable[[int], bool], worth: Callable[[int, int], bool]) -> None:
    """Find the lowest of ``count`` rungs that ``holds`` with few trials: 0, 1, 2, 4, … up to the first that holds, one
    more above it as a safer candidate, then bisection between it and the last that did not hold.

    Bisection ends when the lower rung would not be ``worth`` it, compared with the upper one. A lower rung may hold on
    these samples by chance; certification catches that.
    """
    failed, index, safer = -1, 0, min(1, count - 1)
    while not holds(index):
        if index == count - 1:
            return
        failed, index, safer = index, safer, min(2 * safer, count - 1)
    if safer > index:
        holds(safer)
    while index - failed > 1 and worth(failed, index):
        middle = (failed + index) // 2
        failed, index = (failed, middle) if holds(middle) else (middle, index)


def fixed_order(costs: Mapping[int, float], worth: Mapping[int, bool], least_gain: float) -> list[int]:
    """The order of certification: the rungs that are ``worth`` a test, safest (highest) first, then cheaper ones.

    A rung that does not cost at least ``least_gain`` (a share) less than the one before it is not tested.
    """
    order: list[int] = []
    for index in sorted(costs, reverse=True):
        if worth[index] and (not order or gains(costs[index], costs[order[-1]], least_gain)):
            order.append(index)
    return order


def gains(cost: float, safer: float, least_gain: float) -> bool:
    """Whether a riskier rung's cost is lower than a safer one's by at least ``least_gain``, a share."""
    return cost <= (1 - least_gain) * safer and cost < safer


def fixed_sequence(order: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """Test in order, each at the full level, until one fails; return the last that held, or None."""
    kept = None
    for index in order:
        if not holds(index):
            break
        kept = index
    return kept


@dataclass
class Trials:
    """Builds rungs of a ladder, times them and checks their gates. ``rungs`` has those that were tried."""

    ladder: Ladder
    source: Bundle
    options: QuantizeOptions
    targets: tuple[str, ...]
    folder: Path
    name: str
    report: Report
    for_size: bool = False
    rungs: dict[int, Rung] = field(default_factory=dict)
    best: dict[str, Bench] = field(default_factory=dict)  # by target, the fp32 bundle in each precision

    def path(self, step: int) -> Path:
        """The bundle of a rung, under the name that the result will have."""
        return self.folder / f"rung-{step}" / self.name

    def search(self, data: str | Path, least_gain: float) -> list[int]:
        """Climb on the search split; return the order of certification. Raises GateError if no rung holds or saves."""
        results: dict[int, tuple[Validation, ...]] = {}

        def holds(step: int) -> bool:
            self.report("search", len(self.rungs), len(self.ladder.rungs))
            results[step] = self._try(step, data)
            return _held(results[step])

        climb(
            len(self.ladder.rungs), holds, lambda lower, upper: gains(self._cost(lower), self._cost(upper), least_gain)
        )
        costs = {step: self._cost(step) for step, one in results.items() if _held(one)}
        if not costs:
            hint = "relax the gates, give more samples to search on, or look at `quantize --sensitivity`"
            raise _refusal("no mixture of precisions holds", results[max(results)], hint)
        order = fixed_order(costs, {step: self._worth(self.rungs[step]) for step in costs}, least_gain)
        if not order:
            cheapest = self.rungs[min(costs, key=costs.__getitem__)]
            gain = "smaller" if self._saves_size else "faster"
            taken = ", ".join([f"{cheapest.size:.2f} × the size", *map(str, cheapest.times)])
            raise GateError(
                f"no mixture that passes is {gain} than the float bundle here: the cheapest takes {taken}",
                "keep float (`bench --precision auto` finds its fastest), search on a quiet machine, or use --for-size",
            )
        return order

    def _worth(self, rung: Rung) -> bool:
        """Whether a rung is faster on a target by more than the spread, or smaller if the cost is size."""
        return rung.size < 1 if self._saves_size else any(time.faster for time in rung.times)

    def certify(self, order: Sequence[int], data: str | Path) -> tuple[int, tuple[Validation, ...]]:
        """The rung that a fixed sequence on the certification split keeps, and the evidence for it.

        Raises GateError if not even the first of ``order`` holds.
        """
        evidence: dict[int, tuple[Validation, ...]] = {}

        def holds(step: int) -> bool:
            self.report("certify", order.index(step), len(order))
            evidence[step] = self._judge(step, self.rungs[step].times, data)
            self.rungs[step] = msgspec.structs.replace(self.rungs[step], certification=self._said(evidence[step]))
            return _held(evidence[step])

        kept = fixed_sequence(order, holds)
        if kept is None:
            hint = "give more samples to certify on, or relax the gates; nothing was written"
            raise _refusal("the mixture that held on the search split is not certified", evidence[order[0]], hint)
        return kept, evidence[kept]

    def _try(self, step: int, data: str | Path) -> tuple[Validation, ...]:
        path = self.path(step)
        path.parent.mkdir()
        self.ladder.build(step, path)
        size = open_bundle(path).num_bytes / self.source.num_bytes
        times = tuple(self._time(path, target) for target in self.targets)
        results = self._judge(step, times, data)
        self.rungs[step] = Rung(step, self.ladder.raised(step), times, size, self._said(results))
        if not _held(results):
            shutil.rmtree(path)
        return results

    def _judge(self, step: int, times: Sequence[Time], data: str | Path) -> tuple[Validation, ...]:
        """Validate the rung on each target, in the precision that was timed. NaN outputs fail this rung only.

        Raises BrokenReferenceError if the reference gives NaN, because then no rung can hold.
        """
        common = ValidateOptions(
            self.source,
            self.options.gates,
            against_device=self.targets[0],
            threads=self.options.threads,
            truncate=self.options.truncate,
            keep_failures=True,
        )
        results = tuple(
            validate(self.path(step), data, replace(common, device=time.target, precision=time.precision))
            for time in times
        )
        for result in results:
            if result.failure is not None and result.failure.of_reference:
                result.require()
        return results

    def _said(self, results: Sequence[Validation]) -> tuple[str, ...]:
        """A line for each gate and target, and for each failure."""
        return tuple(
            f"{text} on {target}" if len(self.targets) > 1 else text
            for target, result in zip(self.targets, results, strict=True)
            for text in ([f"failed: {result.failure.message}"] if result.failure else map(str, result.gates))
        )

    def found(self, kept: int, made: tuple[Certificate, ...]) -> Found:
        """The rungs that were tried, with the step ``kept`` and its certificates."""
        steps = sorted(self.rungs)
        slow = tuple(
            f"the kept mixture was not found to be faster on this machine: it takes {time}"
            for time in self.rungs[kept].times
            if not time.faster
        )
        rungs = tuple(self.rungs[step] for step in steps)
        return Found(rungs, steps.index(kept), made, len(self.ladder.rungs), self.ladder.ranking, slow)

    def _time(self, path: Path, target: str) -> Time:
        """Time a rung alternately with the fastest float, so that other work on the machine slows both."""
        how: dict[str, Any] = {"device": target, "runs": _RUNS, "threads": self.options.threads}
        for _ in range(0 if target in self.best else _TRIES):
            self.best[target] = bench(self.source, precision="auto", **how)
            if not self._unsteady(target):
                break
        against = fastest_precision(self.best[target])
        own: Precision = "fp32"
        if len(self.best[target].measurements) > 1 and not self._saves_size:  # saved for `load`'s auto
            own = fastest_precision(bench(path, precision="auto", save=True, **how))
        timed = bench(path, precision=own, against=self.source.path, against_precision=against, **how)
        assert timed.ratio is not None
        assert timed.ratio_quartiles is not None
        why = self._unsteady(target) or timed.unsteady
        return Time(target, timed.measurements[0].p50, timed.ratio, timed.ratio_quartiles, against, why, own)

    def _unsteady(self, target: str) -> str:
        """Why the fastest float precision is not known; empty if it is, as when there is only one."""
        return self.best[target].unsteady if len(self.best[target].measurements) > 1 else ""

    def _cost(self, step: int) -> float:
        return self.rungs[step].size if self._saves_size else self.rungs[step].time

    @property
    def _saves_size(self) -> bool:
        return self.for_size or self.options.scheme != "int8"


def fastest_precision(measured: Bench) -> Precision:
    """The precision of a bundle's fastest engine (for int8, of its float layers); fp32 for ties and unsteady times."""
    found = [precision_of(f", in {measured.measurements[index].precision}") for index in measured.fastest]
    return "fp32" if "fp32" in found or not found else found[0]


def _held(results: Sequence[Validation]) -> bool:
    return all(result.held for result in results)


def _refusal(what: str, results: Sequence[Validation], hint: str) -> GateError:
    """The worst error of all targets: a gate fails, is vacuous, or needs more samples."""
    errors: list[GateError] = []
    for result in results:
        try:
            result.require()
        except GateError as error:
            errors.append(error)
    worst = min(errors, key=lambda error: (type(error) is UndecidedError, type(error) is VacuousGateError))
    return type(worst)(f"{what}: {worst.message}", worst.hint if type(worst) is VacuousGateError else hint)
