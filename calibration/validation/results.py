# SPDX-License-Identifier: Apache-2.0
"""The result of `validate`: both sides, metrics with bounds, gates with their reservations, the worst samples."""

from __future__ import annotations

from typing import Any

import msgspec

from perceiver_export.calibration.validation.gates import Gate, require
from perceiver_export.calibration.validation.scores import MetricResult
from perceiver_export.calibration.validation.worst import WorstClass, WorstSample
from perceiver_export.runtimes.errors import BrokenReferenceError, GateError


class Data(msgspec.Struct, frozen=True):
    """The samples. ``fingerprint``: a hash of inputs and targets that does not depend on their order or files.

    ``labels``: how often each label occurred, by name. ``sequential``: where a sequential run stopped, and its order.
    """

    source: str
    samples: int
    fingerprint: str
    labels: dict[str, int] = {}
    sequential: str = ""


class Failure(msgspec.Struct, frozen=True):
    """The reason why a validation ended early, with a hint; ``of_reference``: the candidate was not the cause."""

    message: str
    hint: str
    of_reference: bool = False


class Validation(msgspec.Struct, frozen=True):
    """The measurements. Shares are in percent, drops in points; fields that need a reference are empty without one.

    ``warning_kinds``: the kind of each warning, one of overlap, repeated, range, left out, cut, assumed, labels,
    unlisted, unseen, itself, quantized, few, unused, unlabelled, one label, chance, wide, unread. ``failure``: NaN
    outputs ended the validation; then only the sides, the machine and the samples so far are known, and no gate holds.
    """

    task: str
    candidate: dict[str, Any]
    reference: dict[str, Any] | None
    data: Data
    metrics: tuple[MetricResult, ...] = ()
    mcnemar: float | None = None
    gates: tuple[Gate, ...] = ()
    warnings: tuple[str, ...] = ()
    worst_samples: tuple[WorstSample, ...] = ()
    worst_classes: tuple[WorstClass, ...] = ()
    machine: dict[str, str] = {}
    warning_kinds: tuple[str, ...] = ()
    failure: Failure | None = None

    def require(self) -> None:
        """Raise GateError if it failed or a gate does not hold, UndecidedError if there are too few samples,
        VacuousGateError if any model passes a gate, and BrokenReferenceError if the reference gave NaN.
        """
        if self.failure is not None:
            kind = BrokenReferenceError if self.failure.of_reference else GateError
            raise kind(self.failure.message, self.failure.hint)
        require(self.gates)

    @property
    def held(self) -> bool:
        """Whether there are gates, and all of them hold."""
        return self.failure is None and bool(self.gates) and all(gate.held for gate in self.gates)

    @property
    def sentence(self) -> str:
        """The result in words.

        Such as `int8 answered 8 more and 5 fewer of 10,000 correctly than fp32; the loss is at most 0.034 points …`.
        """
        if self.failure is not None:
            return f"{self.failure.message}."
        said, name, flips = list[str](), str(self.candidate["name"]), self.flips
        if flips is not None and self.reference is not None:
            counts = f"{flips.gained:,} more and {flips.lost:,} fewer of {self.samples:,}"
            said = [f"{name} answered {counts} correctly than {self.reference['name']}"]
        elif self.metrics:
            first = self.metrics[0]
            said = [f"{first.name} of {name} is {first.candidate.value:.4g} {first.unit}".rstrip()]
        gates = ", ".join(gate.sentence for gate in self.gates)
        finite = "" if said or gates else f"all outputs of {name} on {self.samples:,} samples are finite"
        return "; ".join(filter(None, [*said, gates, finite])) + "."

    @property
    def flips(self) -> MetricResult | None:
        """The share with the lost and gained samples that `mcnemar` compares."""
        return next((result for result in self.metrics if result.lost is not None), None)

    def metric(self, name: str) -> MetricResult | None:
        """The result of that name, if it was measured."""
        return next((result for result in self.metrics if result.name == name), None)

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.data.samples
