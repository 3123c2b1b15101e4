# SPDX-License-Identifier: Apache-2.0
"""Gates that `validate` must prove, and their four outcomes: held, not held, undecided and vacuous.

A gate holds if the samples show, with an error rate of at most one in twenty, that the true value is within the margin.
It does not hold if they show with the same certainty that the true value is beyond it. In between, there are too few
samples, which is never a pass. A gate that any model would pass is vacuous, which is never a pass either.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

import msgspec

from perceiver_export.calibration.validation.metrics import families, find_metric, metrics_of, share_of_right
from perceiver_export.calibration.validation.metrics.base import Metric
from perceiver_export.calibration.validation.options import Gates
from perceiver_export.calibration.validation.scores import Scores
from perceiver_export.calibration.validation.statistics import (
    CONFIDENCE,
    LEAST_FOR_BOOTSTRAP,
    OUTSIDE,
    Estimate,
    rounded,
    scipy_stats,
)
from perceiver_export.runtimes.errors import DataError, GateError, UndecidedError, UsageError, VacuousGateError
from perceiver_export.runtimes.manifest import Manifest

RELATIVE = "% of the reference's"  # unit of a limit that was given as 2%
CAVEAT = "by bootstrap, which is too narrow where samples are few and skewed"  # tests/benchmarks/bound_coverage.py
MARKS = {"held": "PASS", "not held": "FAIL", "undecided": "NOT ENOUGH DATA", "vacuous": "PROVES NOTHING"}
AT_LEAST, AT_MOST = "at least", "at most"
DIGITS = {"points": ".3f", "%": ".2f"}  # of bounds, by unit
_ERRORS = {"not held": GateError, "vacuous": VacuousGateError, "undecided": UndecidedError}
_POWER = 0.8
_SEQUENTIAL = 3  # times as many samples are needed if the run may stop anywhere (tests/benchmarks/sequential.py)
_MOST = 10**9  # samples; nobody has more
# Margins beyond which a gate means little: two of ten answers may change, or a mean may worsen by half.
_WIDE = {"points": 20.0, RELATIVE: 50.0}
_WIDE_AGREEMENT = 80.0


class Wanted(msgspec.Struct, frozen=True):
    """A gate's requirement: a ``subject`` (a drop, an agreement) of ``what`` (at most, at least) ``limit`` in ``unit``.

    ``option`` is the command-line option.
    """

    option: str
    subject: str
    what: str
    limit: float
    unit: str

    @property
    def typed(self) -> str:
        """The option with its limit, as typed."""
        return f"{self.option} {_number(self.limit)}{'%' if self.unit == RELATIVE else ''}"

    def __str__(self) -> str:
        sign = "≥" if self.what.endswith(AT_LEAST) else "≤"  # records of older versions said more
        return f"{self.subject} {sign} {_number(self.limit)} {self.unit}".rstrip()


class Gate(msgspec.Struct, frozen=True):
    """A gate and its outcome: ``measured``, ``lower`` and ``upper`` bound in the unit of ``wanted``.

    ``samples_to_decide``: the number that would decide it in four of five cases if the measured value were the true
    one; None if the gate is decided, or if no number would decide it. ``bounds`` are exact, of a sequential run, or by
    bootstrap, which is too narrow where samples are few and skewed. ``reservations``: why it means less than it seems
    (repeated samples, a reference that guesses); a gate that holds is never shown without them. ``vacuous``: why any
    model would pass it. In text, ``outcome`` is PASS (held), FAIL (not held), NOT ENOUGH DATA (undecided) or PROVES
    NOTHING (vacuous).
    """

    wanted: Wanted
    measured: float
    lower: float
    upper: float
    outcome: Literal["held", "not held", "undecided", "vacuous"]
    samples: int
    samples_to_decide: int | None = None
    reservations: tuple[str, ...] = ()
    bounds: Literal["exact", "sequential", "bootstrap"] = "exact"
    vacuous: str = ""

    @property
    def held(self) -> bool:
        """Whether it passes. An undecided gate does not."""
        return self.outcome == "held"

    @property
    def sentence(self) -> str:
        """The finding in words, such as `the loss is at most 0.034 points (0.6 allowed)`."""
        wanted = self.wanted
        subject = {"--max-drop": "the loss", "--min-agreement": "the agreement"}.get(wanted.option, wanted.subject)
        rule = f"{_number(wanted.limit)} {'required' if wanted.what == AT_LEAST else 'allowed'}"
        return f"{subject} is {self._bound} {wanted.unit}".rstrip() + f" ({rule})"

    @property
    def _bound(self) -> str:
        """The bound that decides, or both."""
        digits = DIGITS.get(self.wanted.unit, ".4g")
        lower, upper = rounded(self.lower, digits, up=False), rounded(self.upper, digits, up=True)
        low = (self.wanted.what == AT_LEAST) == self.held
        found = f"{AT_LEAST} {lower}" if low else f"{AT_MOST} {upper}"
        if self.outcome in ("undecided", "vacuous"):
            found = f"between {lower} and {upper}"
        return found.replace("-", "−")

    def __str__(self) -> str:
        how = {"exact": "", "bootstrap": " by bootstrap", "sequential": " wherever it stops"}[self.bounds]
        sure = ", 95 % bounds" if self.outcome in ("undecided", "vacuous") else " with 95 % confidence"
        but = "".join(f"; but {one}" for one in self.reservations) if self.held else ""
        but = f"; {self.vacuous}" if self.outcome == "vacuous" else but
        measured = _number(self.measured).replace("-", "−")
        return f"{MARKS[self.outcome]}  {self.wanted}: {self._bound}{sure}{how} (measured {measured}){but}"


Ask = tuple[Metric, Wanted]


def _asked(gates: Gates, metrics: Sequence[Metric], measured: Collection[str] | None = None) -> list[Ask]:
    """The gates, each with its metric. ``measured`` names the metrics that were measured, if that is known.

    Raises UsageError for a gate that the task's metrics do not allow, DataError for a metric that was not measured.
    """
    right, agreement = share_of_right(metrics), [metric for metric in metrics if metric.name == "agreement"]
    found: list[Ask] = []
    for option, limit, metric, what, unit in (
        ("--max-drop", gates.max_drop, right, AT_MOST, "points"),
        ("--min-agreement", gates.min_agreement, agreement[0] if agreement else None, AT_LEAST, "%"),
    ):
        if limit is None:
            continue
        if metric is None:
            said = f"{option} does not fit this task, whose metrics are {', '.join(one.name for one in metrics)}"
            hint = "gate on --max-metric-change, or export with output_kinds: a label kind for one output, else none"
            raise UsageError(said, hint)
        subject = f"{metric.name} drop" if what == AT_MOST else metric.name
        found.append((metric, Wanted(option, subject, what, limit, unit)))
    if gates.change is not None:
        found.append(_change(gates, gates.change, metrics, measured))
    elif gates.metric is not None:
        find_metric(metrics, gates.metric)
    for metric, _ in found:
        if measured is not None and metric.name not in measured:
            raise DataError(f"{metric.name} was not measured", "add its targets to the data, such as labels")
    return found


def _change(gates: Gates, limit: float, metrics: Sequence[Metric], measured: Collection[str] | None) -> Ask:
    """The gate on a metric's change: of the metric named, else the first quality measured, else the first distance."""
    if gates.metric is not None:
        metric = find_metric(metrics, gates.metric)
    else:
        metric = next(one for one in metrics if one.can_worsen and (measured is None or one.name in measured))
    likeness = metric.of == "likeness"
    if not metric.can_worsen:
        hint = "gate on --min-agreement, or name a --metric that is better when lower"
        raise UsageError(f"{metric.name} compares both models, so it cannot get worse", hint)
    if gates.relative and (metric.kind == "share" or (likeness and metric.unit != "%")):
        why = "a distance from the reference" if likeness else "a share already"
        said = f"{metric.name} is {why}, so it cannot change by a share of the reference's value"
        raise UsageError(said, "give --max-metric-change without %")
    relative = gates.relative and not likeness  # a distance in percent is relative already
    unit = RELATIVE if relative else "points" if metric.unit == "%" and not likeness else metric.unit
    option = f"--metric {metric.name} --max-metric-change" if gates.metric else "--max-metric-change"
    subject = metric.name if likeness else f"worsening of {metric.name}"
    return metric, Wanted(option, subject, AT_MOST, limit * (100.0 if gates.relative else 1.0), unit)


def check_gates(gates: Gates, metrics: Sequence[Metric], has_reference: bool, sequential: bool = False) -> None:
    """Raise UsageError for a gate that needs a reference, or that the task's ``metrics`` do not allow.

    A ``sequential`` run can only decide gates on the share of single answers.
    """
    if gates.any and not has_reference:
        raise UsageError("a gate needs a reference", "give --against BUNDLE or --against CHECKPOINT")
    for metric, wanted in _asked(gates, metrics):
        if sequential and not _on_answers(metric, wanted):
            said = f"--sequential cannot decide {wanted.typed}: it needs a share of single answers"
            raise UsageError(said, "gate on --max-drop or --min-agreement of a classifier, or leave --sequential out")


def _on_answers(metric: Metric, wanted: Wanted) -> bool:
    """Whether a gate counts single answers, so that its bounds are exact."""
    return metric.kind == "share" and not wanted.option.endswith("change")


def check_against_fp32(gates: Gates, manifest: Manifest) -> None:
    """Raise UsageError, before anything runs, if these gates cannot compare a bundle with the one it is made from."""
    if gates.metric is not None and gates.change is None:
        raise UsageError("--metric has no effect without --max-metric-change", "give both, or neither")
    check_gates(gates, metrics_of(families(manifest, gates.own)), has_reference=True)


def judge(gates: Gates, scores: Scores) -> tuple[Gate, ...]:
    """The gates with their outcomes. Raises DataError if the data lacks the targets for one."""
    return tuple(_judge(*ask, scores) for ask in _asked(gates, scores.metrics, scores.measured))


def _judge(metric: Metric, wanted: Wanted, scores: Scores) -> Gate:
    relative, spread = wanted.unit == RELATIVE, None
    scale = 100.0 if relative else metric.scale
    if _on_answers(metric, wanted):
        lost, gained = scores.flips(metric)
        variance = (lost + gained) / scores.count - ((lost - gained) / scores.count) ** 2
        spread = 100 * math.sqrt(max(variance, 0.0))
    found, guessed = scores.distance(metric, relative).times(scale), scores.guessed(metric, relative)
    sign, vacuous = -1.0 if wanted.what == AT_LEAST else 1.0, scores.blind(metric)
    if guessed is not None and sign * guessed * scale <= sign * wanted.limit and not vacuous:
        shown = f"{wanted.subject} {_number(guessed * scale)} {wanted.unit}".rstrip()
        vacuous = f"{scores.naive[metric.name][0]} passes too ({shown})"
    return decide(wanted, found, scores.count, spread, vacuous, scores.bounds.kind)


def settled(gates: Gates, scores: Scores) -> bool:
    """Whether a sequential run can stop: one gate does not hold, or the samples decide all of them."""
    found = [_outcome(gate.wanted, gate.lower, gate.upper) for gate in judge(gates, scores)]
    return "not held" in found or "undecided" not in found


def _outcome(wanted: Wanted, lower: float, upper: float) -> Literal["held", "not held", "undecided"]:
    sign = -1.0 if wanted.what == AT_LEAST else 1.0
    past = [sign * bound > sign * wanted.limit for bound in (lower, upper)]
    return "not held" if all(past) else "undecided" if any(past) else "held"


def decide(
    wanted: Wanted,
    found: Estimate,
    samples: int,
    spread: float | None = None,
    vacuous: str = "",
    kind: Literal["exact", "sequential"] = "exact",
) -> Gate:
    """The gate's outcome by ``found``, in its unit.

    ``spread``: the standard deviation of one sample, for exact bounds; None for bootstrap bounds. Fewer than 30 samples
    leave these undecided, and so do samples that are all equal, about which resampling shows nothing. ``vacuous``: why
    any model would pass; it does not matter if the gate does not hold. ``kind``: the kind of exact bounds.
    """
    unknown = spread is None and (samples < LEAST_FOR_BOOTSTRAP or found.lower == found.upper)
    outcome: Literal["held", "not held", "undecided", "vacuous"] = "undecided"
    if not unknown:
        outcome = _outcome(wanted, found.lower, found.upper)
    if vacuous and outcome != "not held":
        outcome = "vacuous"
    needed = None
    if outcome == "undecided":
        few = LEAST_FOR_BOOTSTRAP if samples < LEAST_FOR_BOOTSTRAP else None
        needed = few if unknown else _needed(wanted, found, samples, spread)
        if needed is not None and kind == "sequential":
            needed *= _SEQUENTIAL
    values = (found.value, found.lower, found.upper, outcome, samples, needed)
    return Gate(
        wanted, *values, bounds="bootstrap" if spread is None else kind, vacuous=vacuous if outcome == "vacuous" else ""
    )


def _needed(wanted: Wanted, found: Estimate, samples: int, spread: float | None) -> int | None:
    """Samples for a one-sided test at the distance of ``found`` from the limit; None if no number would decide.

    With exact bounds, samples without flips must also rule out a share of ``room``: (1 − room)^n ≤ error.
    """
    sign, z = (-1.0 if wanted.what == AT_LEAST else 1.0), float(scipy_stats().norm.ppf(CONFIDENCE))
    distance, room, error = sign * (wanted.limit - found.value), 0.0, 1 - CONFIDENCE
    if spread is None:  # the bound on the limit's side shows how the mean scatters, and so how one sample does
        spread = (found.upper - found.value if distance > 0 else found.value - found.lower) / z * math.sqrt(samples)
    else:
        room = wanted.limit / 100 if sign > 0 else 1 - wanted.limit / 100
        error -= OUTSIDE if sign > 0 else 0.0
    if distance == 0 or (distance > 0 and room <= 0 and spread <= 0):
        return None
    by_spread = ((z + float(scipy_stats().norm.ppf(_POWER))) * spread / distance) ** 2
    by_silence = math.log(error) / math.log1p(-room) if distance > 0 and 0 < room < 1 else 0.0
    needed = math.ceil(max(by_spread, by_silence, 1.0))
    return needed if needed < _MOST else None


def too_wide(gates: Iterable[Gate]) -> dict[str, str]:
    """A warning of kind ``wide`` if a gate would hold even for a much worse candidate."""
    said = [
        f"{wanted.typed} is a very wide margin: {wanted.subject} of {wanted.limit:g} {wanted.unit} would still pass"
        for wanted in (gate.wanted for gate in gates)
        if (wanted.limit < _WIDE_AGREEMENT if wanted.what == AT_LEAST else wanted.limit > _WIDE.get(wanted.unit, 1e300))
    ]
    return {"wide": "; ".join(said)} if said else {}


def unread(gates: Gates, scores: Scores) -> dict[str, str]:
    """A warning of kind ``unread`` if no gate depends on some outputs: they could be anything."""
    asked = _asked(gates, scores.metrics, scores.measured)
    read = {name for metric, _ in asked for name in scores.reads[metric.name]}
    left = [name for name in scores.outputs if name not in read]
    if not asked or not left:
        return {}
    return {"unread": f"no gate depends on {' or '.join(map(repr, left))}: it could be anything"}


def require(gates: Sequence[Gate]) -> None:
    """Raise GateError if a gate does not hold, else VacuousGateError, else UndecidedError; the message names all."""
    open_ = [gate for outcome in _ERRORS for gate in gates if gate.outcome == outcome]
    if open_:
        raise _ERRORS[open_[0].outcome]("; ".join(map(str, open_)), advice(open_[0]))


def advice(gate: Gate) -> str:
    """The hint for a gate that did not hold."""
    if gate.outcome == "not held":
        return "do not ship the candidate, or relax the gate: it is further from its reference than allowed"
    if gate.outcome == "vacuous":
        return "set a tighter limit, or give data, a reference or a metric that tells models apart"
    if gate.samples_to_decide is None:
        if gate.lower == gate.upper:
            return "give other samples, or gate on a share: no sample differs from another, so there are no bounds"
        return "change the limit: the measured value is too close to it for any number of samples to decide"
    more = "" if gate.bounds == "bootstrap" else ", or more if answers flip more often than in these"
    below, wanted = gate.measured < gate.wanted.limit, gate.wanted
    if below == (wanted.what == AT_LEAST):
        return (
            f"relax the gate or improve the candidate: about {gate.samples_to_decide:,} fresh samples would likely FAIL"
        )
    return (
        f"validate on about {gate.samples_to_decide:,} fresh samples{more}: {gate.samples:,} are too few to pass;"
        " adding to these until the gate holds would void the 95 % confidence"
    )


def _number(value: float) -> str:
    value += 0.0  # turns -0 into 0
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}".rstrip("0").rstrip(".")
