# SPDX-License-Identifier: Apache-2.0
"""What a report says, as plain rows; the templates only lay it out."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field

from perceiver_export.calibration.gates import CAVEAT
from perceiver_export.calibration.scores import MetricResult
from perceiver_export.calibration.statistics import Estimate
from perceiver_export.calibration.validated import Validation

Rows = tuple[tuple[str, ...], ...]

_APART = ("name", "certificates", "graphs")  # of a side, what is not said in one line with its engine
_CLASSES = 20  # at most, in the table of them
_NARROW, _GAP = 50, 2  # characters that fit into 390 pixels, and those between two columns


@dataclass(frozen=True)
class Table:
    """A title, column names (``>`` at the end: numbers, to the right), rows, and a sentence below."""

    title: str
    columns: tuple[str, ...]
    rows: Rows
    note: str = ""

    @property
    def stacks(self) -> bool:
        """Whether a telephone is too narrow for it, so that each row becomes a list there."""
        headers = [max(map(len, name.rstrip(">").split()), default=0) for name in self.columns]
        widths = (max(map(len, cells)) + _GAP for cells in zip(*self.rows, strict=True))
        return any(headers) and sum(map(max, widths, (width + _GAP for width in headers))) > _NARROW


@dataclass(frozen=True)
class Speed:
    """One side on one target: milliseconds a call, MiB of a fresh process."""

    target: str
    name: str
    p50: float
    p95: float
    peak_memory: float
    size: float  # MiB on disk


@dataclass(frozen=True)
class Report:
    """Everything. ``validations`` has one a target, at least one; ``tables`` follow after the worst samples."""

    title: str
    validations: tuple[Validation, ...]
    speeds: tuple[Speed, ...] = ()
    sensitivity: tuple[tuple[str, float], ...] = ()  # layer, SQNR in dB; worst first
    tables: tuple[Table, ...] = ()
    sensitivity_note: str = ""
    certificates: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``held`` only if every gate on every target held; ``failed`` where outputs were not finite on one."""
        if any(validation.failure is not None for validation in self.validations):
            return "failed"
        outcomes = {gate.outcome for validation in self.validations for gate in validation.gates}
        for outcome in ("not held", "undecided", "held"):
            if outcome in outcomes:
                return outcome
        return "no gate asked"

    @property
    def summary(self) -> str:
        """One sentence that says what was found."""
        first = self.validations[0]
        against = f" against {first.reference['name']}" if first.reference is not None else ""
        on = ", ".join(str(validation.candidate.get("target", "")) for validation in self.validations)
        return f"{first.candidate['name']}{against} on {first.samples:,} samples, {on}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of all targets, each once; first why one came to no end."""
        failures = [validation.failure.message for validation in self.validations if validation.failure is not None]
        warnings = [warning for validation in self.validations for warning in validation.warnings]
        return tuple(dict.fromkeys(failures + warnings))

    @property
    def reservations(self) -> tuple[str, ...]:
        """What makes gates that held say less than they seem to."""
        said = (one for validation in self.validations for gate in validation.gates for one in gate.reservations)
        return tuple(dict.fromkeys(said))

    @property
    def gates(self) -> Table:
        """A row a gate and target."""
        rows = []
        for validation in self.validations:
            for gate in validation.gates:
                needed = gate.samples_to_decide
                more = "" if needed is None else f"about {needed:,} samples would decide"
                more = "; ".join(f"but {one}" for one in gate.reservations) if gate.held else more
                asked = gate.wanted.typed
                value, lower, upper = map(_number, (gate.measured, gate.lower, gate.upper))
                bounds = f"{value} ({lower} to {upper}) {gate.wanted.unit}".strip()
                rows.append((str(validation.candidate.get("target", "")), asked, gate.outcome, bounds, more))
        gates = (gate for validation in self.validations for gate in validation.gates)
        means = dict.fromkeys(gate.wanted.subject for gate in gates if gate.bounds == "bootstrap")
        note = f"Bounds of {', '.join(means)} are {CAVEAT}. The others are exact." if means else ""
        return Table("Gates", ("target", "asked", "outcome", "measured (95 % bounds)>", ""), tuple(rows), note)

    @property
    def accuracy(self) -> Table:
        """A row a metric and target."""
        rows = [
            (str(validation.candidate.get("target", "")), *metric_row(metric))
            for validation in self.validations
            for metric in validation.metrics
        ]
        first = self.validations[0]
        note = "Each bound holds with 95 % by itself."
        flips = next((metric for metric in first.metrics if metric.lost is not None), None)
        if flips is not None and first.mcnemar is not None:
            note += (
                f" Right answers on {first.candidate.get('target', 'the first target')} that only the reference gives:"
                f" {flips.lost:,}; only the candidate: {flips.gained:,} (exact McNemar p = {first.mcnemar:.3g})."
            )
        columns = ("target", "metric", "candidate (95 % bounds)>", "reference>", "worse by (95 % bounds)>")
        return Table("Accuracy", columns, tuple(rows), note)

    @property
    def latency(self) -> Table:
        """A row a side and target; empty where nothing was timed."""
        rows = tuple(
            (
                speed.target,
                speed.name,
                f"{speed.p50:.2f} ms",
                f"{speed.p95:.2f} ms",
                f"{speed.peak_memory:.0f} MiB",
                f"{speed.size:.1f} MiB",
            )
            for speed in self.speeds
        )
        return Table("Latency, memory, size", ("target", "", "p50>", "p95>", "peak memory>", "on disk>"), rows)

    @property
    def worst_layers(self) -> Table:
        """The few most sensitive ones, for where there is no plot."""
        rows = tuple((name, f"{decibels:.1f}") for name, decibels in self.sensitivity[:5])
        return Table("Most sensitive layers", ("layer", "SQNR, dB>"), rows, self.sensitivity_note)

    @property
    def classes(self) -> Table:
        """The classes of the first target in which something changed, the one that fell most first."""
        found = self.validations[0].worst_classes
        changed = [row for row in found if row.changed]
        rows = tuple(
            (
                row.label,
                f"{row.samples:,}",
                _share(row.candidate),
                _share(row.reference),
                "" if row.flips is None else f"{row.flips:,}",
            )
            for row in changed[:_CLASSES]
        )
        what = "a wrong answer" if self.validations[0].reference is None else "an answer that differs"
        note = f"{len(changed):,} of {len(found):,} classes have {what}; the largest fall is first."
        return Table("Classes", ("label", "samples>", "right>", "reference right>", "answers that differ>"), rows, note)

    @property
    def environment(self) -> Table:
        """When, machine, engines, data."""
        first = self.validations[0]
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        rows = [("date", today), *first.machine.items(), ("data", first.data.source), ("samples", f"{first.samples:,}")]
        rows.append(("fingerprint of the data", first.data.fingerprint))
        for validation in self.validations:
            for side in (validation.candidate, validation.reference or {}):
                if side:
                    kept = [key for key, value in side.items() if value and key not in _APART]
                    rows.append((str(side["name"]), ", ".join(f"{key} {side[key]}" for key in kept)))
                    rows += [(f"{side['name']}: {file}", digest) for file, digest in side.get("graphs", {}).items()]
        rows += self.versions.items()
        return Table("Environment", ("", ""), tuple(dict.fromkeys(rows)))


def metric_row(metric: MetricResult) -> tuple[str, str, str, str]:
    """Name, candidate, reference, worsening, as texts."""
    unit, change = metric.unit, metric.worsening
    worse = ""
    if change is not None:
        digits = "+.3f" if unit == "%" else "+.3g"
        value, lower, upper = (format(bound, digits) for bound in (change.value, change.lower, change.upper))
        worse = f"{value} ({lower} to {upper}) {'points' if unit == '%' else unit}".strip()
    other = "" if metric.reference is None else shown(metric.reference.value, unit)
    return metric.name, f"{shown(metric.candidate.value, unit)} ({_bounds(metric.candidate, unit)})", other, worse


def shown(value: float, unit: str) -> str:
    """A number with its unit, percent with two digits."""
    return f"{value:.2f} %" if unit == "%" else f"{value:.3g} {unit}".strip()


def sides(validations: Sequence[Validation]) -> tuple[str, ...]:
    """Targets, in order."""
    return tuple(str(validation.candidate.get("target", "")) for validation in validations)


def _bounds(found: Estimate, unit: str) -> str:
    return f"{found.lower:.2f} to {found.upper:.2f}" if unit == "%" else f"{found.lower:.3g} to {found.upper:.3g}"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"
