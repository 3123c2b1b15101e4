# SPDX-License-Identifier: Apache-2.0
"""What `validate` found: both sides, metrics with bounds, gates with their reservations, the worst samples."""

from __future__ import annotations

from typing import Any

import msgspec

from perceiver_export.calibration.gates import Gate, require
from perceiver_export.calibration.scores import MetricResult
from perceiver_export.calibration.statistics import Proportion, proportion
from perceiver_export.calibration.worst import WorstClass, WorstSample
from perceiver_export.runtimes.errors import BrokenReferenceError, GateError


class Data(msgspec.Struct, frozen=True):
    """What it was measured on. ``fingerprint``: a hash of the samples' inputs and of the targets that they were judged
    by, whatever their order or files.
    """

    source: str
    samples: int
    fingerprint: str


class Failure(msgspec.Struct, frozen=True):
    """What made an end of it, and what to do; ``of_reference``: it was not the candidate's fault."""

    message: str
    hint: str
    of_reference: bool = False


class Validation(msgspec.Struct, frozen=True):
    """What was measured. Shares are in percent, drops in points; fields that need a reference are empty without one.

    ``warning_kinds``: of each warning one of overlap, repeated, range, itself, quantized, few, unused, one label,
    chance. ``failure``: why it came to no end, NaN outputs; then nothing but the sides, the machine and the samples so
    far is in it, and no gate can hold.
    """

    task: str
    candidate: dict[str, Any]
    reference: dict[str, Any] | None
    data: Data
    metrics: tuple[MetricResult, ...]
    mcnemar: float | None
    gates: tuple[Gate, ...]
    warnings: tuple[str, ...]
    worst_samples: tuple[WorstSample, ...]
    worst_classes: tuple[WorstClass, ...]
    machine: dict[str, str]
    warning_kinds: tuple[str, ...] = ()
    failure: Failure | None = None

    def require(self) -> None:
        """Raise GateError where it failed or a gate does not hold, UndecidedError where the samples are too few,
        BrokenReferenceError where the reference gave NaN.
        """
        if self.failure is not None:
            kind = BrokenReferenceError if self.failure.of_reference else GateError
            raise kind(self.failure.message, self.failure.hint)
        require(self.gates)

    @property
    def held(self) -> bool:
        """Whether gates were asked for, and all of them hold."""
        return self.failure is None and bool(self.gates) and all(gate.held for gate in self.gates)

    def metric(self, name: str) -> MetricResult | None:
        """The result of that name, if it was measured."""
        return next((result for result in self.metrics if result.name == name), None)

    @property
    def samples(self) -> int:
        """How many samples there were."""
        return self.data.samples

    @property
    def top1(self) -> Proportion | None:
        """The candidate's right answers."""
        return self._count("top-1", of_reference=False)

    @property
    def reference_top1(self) -> Proportion | None:
        """The reference's right answers."""
        return self._count("top-1", of_reference=True)

    @property
    def drop(self) -> float | None:
        """Measured fall of top-1 in points."""
        result = self.metric("top-1")
        return None if result is None or result.worsening is None else result.worsening.value

    @property
    def agreement(self) -> Proportion | None:
        """Samples to which both give the same first label."""
        return self._count("agreement", of_reference=False)

    def _count(self, name: str, of_reference: bool) -> Proportion | None:
        result = self.metric(name)
        side = None if result is None else result.reference if of_reference else result.candidate
        if side is None or self.task == "fill-mask":
            return None
        return proportion(round(side.value / 100 * self.samples), self.samples)
