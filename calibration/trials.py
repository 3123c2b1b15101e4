# SPDX-License-Identifier: Apache-2.0
"""Rungs of a ladder on trial: built, held against gates, timed, certified."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.calibration.ladder import Ladder
from perceiver_export.calibration.observe import Report
from perceiver_export.calibration.plan import Scheme
from perceiver_export.calibration.sequence import climb, fixed_order, fixed_sequence, gains
from perceiver_export.calibration.validated import Validation
from perceiver_export.calibration.validation import validate
from perceiver_export.runtimes.benchmark import bench
from perceiver_export.runtimes.bundle import open_bundle
from perceiver_export.runtimes.errors import GateError, UndecidedError

_RUNS = 40


class Time(msgspec.Struct, frozen=True):
    """Median milliseconds of a call on a target; ``ratio`` to fp32's there, the median over pairs of blocks in turn."""

    target: str
    milliseconds: float
    ratio: float


class Rung(msgspec.Struct, frozen=True):
    """One mixture: its place on the ladder, the layers that went back, what it costs, and what the gates said.

    ``size`` is the bundle's as a share of fp32's. ``search`` and ``certification`` have a line a gate and target, one
    that begins with failed where an output was NaN or infinite.
    """

    step: int
    precision: dict[str, Scheme]
    times: tuple[Time, ...]
    size: float
    search: tuple[str, ...]
    certification: tuple[str, ...] = ()

    @property
    def time(self) -> float:
        """Geometric mean over targets of the time as a share of fp32's."""
        return math.exp(sum(math.log(time.ratio) for time in self.times) / len(self.times))


@dataclass
class Trials:
    """Rungs of a ladder as they are built, held against gates and timed. ``rungs`` has those that were tried."""

    ladder: Ladder
    folder: Path
    name: str
    targets: tuple[str, ...]
    settings: Mapping[str, Any]
    by_time: bool
    report: Report
    rungs: dict[int, Rung] = field(default_factory=dict)

    def path(self, step: int) -> Path:
        """The bundle of a rung, under the name that it is to have."""
        return self.folder / f"rung-{step}" / self.name

    def search(self, data: str | Path, least_gain: float) -> list[int]:
        """Climb on the search split; gives the order of certification. Raises GateError where no rung holds."""
        count = len(self.ladder.rungs)

        def holds(step: int) -> bool:
            self.report("search", len(self.rungs), count)
            return self._try(step, data)

        climb(count, holds, lambda lower, upper: gains(self._cost(lower), self._cost(upper), least_gain))
        held = {step: all_held(rung.search) for step, rung in self.rungs.items()}
        order = fixed_order({step: self._cost(step) for step in held}, held, least_gain)
        if not order:
            hint = "ask for less, give more samples to search on, or look at `quantize --sensitivity`"
            raise _refusal("no mixture of precisions holds", self.rungs[max(held)].search, hint)
        return order

    def certify(self, order: Sequence[int], data: str | Path) -> tuple[int, tuple[Validation, ...]]:
        """Which rung is kept, by a fixed sequence on the certification split, and the evidence for it.

        Raises GateError where not even the first of ``order`` holds.
        """
        evidence: dict[int, tuple[Validation, ...]] = {}

        def holds(step: int) -> bool:
            self.report("certify", order.index(step), len(order))
            said, evidence[step] = self._judge(step, data)
            self.rungs[step] = msgspec.structs.replace(self.rungs[step], certification=said)
            return all_held(said)

        kept = fixed_sequence(order, holds)
        if kept is None:
            hint = "give more samples to certify on, or ask for less; nothing was written"
            said = self.rungs[order[0]].certification
            raise _refusal("what held on the search split could not be certified", said, hint)
        return kept, evidence[kept]

    def _try(self, step: int, data: str | Path) -> bool:
        path = self.path(step)
        path.parent.mkdir()
        self.ladder.build(step, path)
        said, _ = self._judge(step, data)
        times = tuple(self._time(path, target) for target in self.targets)
        size = bundle_size(path) / bundle_size(self.settings["against"].path)
        self.rungs[step] = Rung(step, self.ladder.raised(step), times, size, said)
        if not all_held(said):
            shutil.rmtree(path)
        return all_held(said)

    def _judge(self, step: int, data: str | Path) -> tuple[tuple[str, ...], tuple[Validation, ...]]:
        """What the gates say of a rung on each target. NaN outputs are the rung's failure, and others may hold.

        Raises BrokenReferenceError where it is the reference that gives NaN: then no rung can hold.
        """
        options = {**self.settings, "keep_failures": True}
        results = tuple(validate(self.path(step), data, device=target, **options) for target in self.targets)
        for result in results:
            if result.failure is not None and result.failure.of_reference:
                result.require()
        several = len(self.targets) > 1
        marks = [f" on {target}" if several else "" for target in self.targets]
        said = (f"{text}{mark}" for one, mark in zip(results, marks, strict=True) for text in _said(one))
        return tuple(said), results

    def _time(self, path: Path, target: str) -> Time:
        """In turn with fp32, so that whatever else the machine does hits both."""
        against, threads = self.settings["against"].path, self.settings["threads"]
        timed = bench(path, against=against, device=target, runs=_RUNS, threads=threads)
        return Time(target, timed.measurements[0].p50, timed.ratio or 1.0)

    def _cost(self, step: int) -> float:
        return self.rungs[step].time if self.by_time else self.rungs[step].size


def all_held(said: Sequence[str]) -> bool:
    """Whether every gate held, and there was one."""
    return bool(said) and all(text.startswith("held") for text in said)


def _said(result: Validation) -> tuple[str, ...]:
    """A line a gate; of outputs that were not finite one that can never be taken for held."""
    if result.failure is not None:
        return (f"failed: {result.failure.message}",)
    return tuple(map(str, result.gates))


def _refusal(what: str, said: Sequence[str], hint: str) -> GateError:
    """The error that quotes the first line that is not held; undecided where nothing worse was said."""
    open_ = [text for text in said if not all_held([text])]
    decided = [text for text in open_ if not text.startswith("undecided")]
    kind = GateError if decided else UndecidedError
    return kind(f"{what}: {(decided or open_)[0]}", hint)


def bundle_size(path: Path) -> int:
    """Bytes of the files that a manifest names."""
    return sum(entry.size for entry in open_bundle(path, "never").manifest.files.values())
