# SPDX-License-Identifier: Apache-2.0
"""The content of a report as rows of tables, which the terminal, HTML and Markdown each draw in their own way."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version

from perceiver_export.calibration.quantization.record import Calibration
from perceiver_export.calibration.validation.gates import AT_LEAST, CAVEAT, DIGITS, MARKS, Gate
from perceiver_export.calibration.validation.results import Validation
from perceiver_export.calibration.validation.statistics import Estimate, rounded
from perceiver_export.runtimes.benchmark import Measurement
from perceiver_export.runtimes.manifest import Manifest, Part, Stage

_APART = ("name", "certificates", "graphs")  # keys of a side that its engine's line omits
_CLASSES, _LAYERS = 20, 15  # maximum rows of their tables
_CELL = 60  # maximum characters of an answer
_MIB = 1 << 20


@dataclass(frozen=True)
class Bar:
    """A bar of ``width`` from ``left``, with a dot at ``dot`` and a line at ``limit``, all in percent of the column.

    ``allowed``: start and end of the range of allowed values.
    """

    left: float
    width: float
    dot: float | None = None
    limit: float | None = None
    allowed: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Table:
    """A title, column names (``>`` at the end: numbers, right-aligned), rows of texts, a note, a bar per row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    bars: Sequence[Bar] = ()

    def without_empty(self) -> Table:
        """Without the columns that are empty in every row."""
        return self.without(*(name for name, *cells in zip(self.columns, *self.rows, strict=True) if not any(cells)))

    def without(self, *names: str) -> Table:
        """Without the columns of these names."""
        kept = [index for index, name in enumerate(self.columns) if name not in names]
        rows = [tuple(row[index] for index in kept) for row in self.rows]
        return replace(self, columns=tuple(self.columns[index] for index in kept), rows=rows)


@dataclass(frozen=True)
class Report:
    """Everything that a report shows. ``validations`` has one per target; ``tables`` are about the bundle itself.

    ``speeds``: each side on each target; the candidate's ratio is to the reference's time. ``unsteady``: why the times
    are too unsteady to compare. ``sensitivity``: layers and their SQNR in dB, worst first. ``certificates``: those that
    the validations support. ``date`` is today.
    """

    title: str
    validations: tuple[Validation, ...]
    speeds: tuple[Measurement, ...] = ()
    sensitivity: tuple[tuple[str, float], ...] = ()
    tables: tuple[Table, ...] = ()
    sensitivity_note: str = ""
    certificates: tuple[str, ...] = ()
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    unsteady: str = ""
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).date().isoformat())

    @property
    def verdict(self) -> str:
        """``held`` only if every gate held on every target; ``failed`` if outputs were not finite on one."""
        if any(validation.failure is not None for validation in self.validations):
            return "failed"
        outcomes = {gate.outcome for _, gate in self._gates}
        return next((one for one in ("not held", "vacuous", "undecided", "held") if one in outcomes), "no gate asked")

    @property
    def mark(self) -> str:
        """The verdict as people say it."""
        reserved = ", with reservations" if self.verdict == "held" and self.reservations else ""
        return {**MARKS, "failed": "FAIL"}.get(self.verdict, "NO GATE") + reserved

    @property
    def origin(self) -> str:
        """Date and versions, of this package and of the engines."""
        engines = [f"{one.candidate['engine']} {one.candidate['version']}" for one in self.validations]
        return ", ".join(dict.fromkeys([self.date, f"perceiver-export {version('perceiver-export')}", *engines]))

    @property
    def summary(self) -> str:
        """One line: both sides, the samples and the targets."""
        first, places = self.validations[0], []
        for one in self.validations:
            precision = f" in {one.candidate['precision']}" if "precision" in one.candidate else ""
            other = (one.reference or {}).get("target", "")
            beside = f" (reference on {other})" if other not in ("", one.candidate.get("target")) else ""
            places.append(f"{_target(one)}{precision}{beside}")
        against = f" against {first.reference['name']}" if first.reference is not None else ""
        plural = "s" if first.samples != 1 else ""
        return f"{first.candidate['name']}{against} on {first.samples:,} sample{plural}, {', '.join(places)}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of all targets, without duplicates; failures first."""
        failures = [validation.failure.message for validation in self.validations if validation.failure is not None]
        warnings = [warning for validation in self.validations for warning in validation.warnings]
        return tuple(dict.fromkeys(failures + warnings))

    @property
    def reservations(self) -> tuple[str, ...]:
        """Reasons why gates that held mean less than they seem to."""
        return tuple(dict.fromkeys(one for _, gate in self._gates for one in gate.reservations))

    @property
    def _gates(self) -> list[tuple[str, Gate]]:
        return [(self._where(validation), gate) for validation in self.validations for gate in validation.gates]

    @property
    def gates(self) -> Table:
        """One row per gate and target."""
        rows = []
        for target, gate in self._gates:
            needed = gate.samples_to_decide
            more = "" if needed is None else f"about {needed:,} samples would decide"
            more = "; ".join(f"but {one}" for one in gate.reservations) if gate.held else gate.vacuous or more
            unit, found = gate.wanted.unit, Estimate(gate.measured, gate.lower, gate.upper)
            measured = f"{_bounded(found, DIGITS.get(unit, '.4g'))} {unit}".strip()
            rows.append((target, str(gate.wanted), MARKS[gate.outcome], measured, more))
        means = ", ".join(dict.fromkeys(gate.wanted.subject for _, gate in self._gates if gate.bounds == "bootstrap"))
        note = f"Bounds of {means} are {CAVEAT}. The others are exact." if means else ""
        columns = ("target", "allowed", "outcome", "measured (95 % bounds)>", " ")
        return Table("Gates", columns, rows, note, [_interval(gate) for _, gate in self._gates]).without_empty()

    @property
    def accuracy(self) -> Table:
        """One row per metric and target."""
        rows: list[tuple[str, ...]] = []
        for one in self.validations:
            if not one.metrics:
                found = "all finite; no labels or reference to measure against"
                rows.append((self._where(one), "outputs", found if one.failure is None else "NaN or infinite", "", ""))
            for metric in one.metrics:
                percent, change = metric.unit == "%", metric.worsening
                digits, points = (".2f", "+.3f") if percent else (".3g", "+.3g")
                if change is not None and metric.better == "higher":
                    change = Estimate(-change.value, -change.upper, -change.lower)
                share = percent and metric.kind in ("share", "fraction")
                name = metric.name if share or not metric.unit else f"{metric.name}, {metric.unit}"
                other = "" if metric.reference is None else rounded(metric.reference.value, digits)
                cells = (_bounded(metric.candidate, digits), other, "" if change is None else _bounded(change, points))
                rows.append((self._where(one), name, *cells))
        first = self.validations[0]
        note, flips = "Ranges are 95 % bounds, each by itself. Shares are in %, their changes in points.", first.flips
        if flips is not None and first.mcnemar is not None:
            note += (
                f" On {_target(first)}, only the reference is right on {flips.lost:,} samples, and only the candidate"
                f" on {flips.gained:,} (exact McNemar p = {first.mcnemar:.3g})."
            )
        if first.data.sequential:
            note = "The run {}. Bounds of shares hold wherever it stops, others only for a fixed number of samples."
            note = note.format(first.data.sequential)
        columns = ("target", "metric", "candidate>", "reference>", "change>")
        return Table("Accuracy", columns, rows, note).without_empty()

    def _where(self, validation: Validation) -> str:
        """The target in tables; empty if there is only one."""
        return _target(validation) if len(self.validations) > 1 else ""

    @property
    def latency(self) -> Table:
        """One row per side and target, with the one measurement of speed; empty if nothing was timed."""
        rows = []
        for one in self.speeds:
            low, high = one.ratio_quartiles or (0.0, 0.0)
            ratio = ("", "") if one.ratio is None else (f"{one.ratio:.3f} ×", f"{low:.3f} to {high:.3f}")
            times = (f"{one.p50:.2f} ms", f"{one.p95:.2f} ms", *ratio)
            rows.append((one.target, one.name, *times, f"{one.peak_memory:.0f} MiB", f"{one.size:.1f} MiB"))
        paired = any(one.ratio is not None for one in self.speeds)
        note = "Both sides were timed alternately. The ratio is the median over pairs. Bars show p50." if paired else ""
        note = f"The times are too unsteady to compare: {self.unsteady}. {note}".strip() if self.unsteady else note
        times_ = ("p50>", "p95>", "of the reference's time>", "half of the pairs>")
        columns = ("target", "side", *times_, "peak memory>", "on disk>")
        bars = _lengths([one.p50 for one in self.speeds])
        return Table("Latency, memory, size", columns, rows, note, bars).without_empty()

    @property
    def layers(self) -> Table:
        """The most sensitive layers, worst first."""
        worst = self.sensitivity[:_LAYERS]
        rows = [(name, f"{decibels:.1f}") for name, decibels in worst]
        bars = _lengths([decibels for _, decibels in worst])
        return Table("Most sensitive layers", ("layer", "SQNR, dB>"), rows, self.sensitivity_note, bars)

    @property
    def classes(self) -> Table:
        """The classes of the first target in which something changed, the largest drop first."""
        first = self.validations[0]
        changed, rows = [row for row in first.worst_classes if row.changed], []
        for row in changed[:_CLASSES]:
            shares = ("" if share is None else f"{share:.1f} %" for share in (row.candidate, row.reference))
            rows.append((row.label, f"{row.samples:,}", *shares, "" if row.flips is None else f"{row.flips:,}"))
        what = "a wrong answer" if first.reference is None else "an answer that differs"
        note = f"{len(changed):,} of {len(first.worst_classes):,} classes have {what}; the largest drop comes first."
        columns = ("label", "samples>", "right>", "reference right>", "answers that differ>")
        return Table("Worst classes", columns, rows, note).without_empty()

    @property
    def samples(self) -> Table:
        """The worst samples of the first target, worst first, with two scores in which they differ."""
        units, rows = {metric.name: metric.unit for metric in self.validations[0].metrics}, []
        worst = self.validations[0].worst_samples
        differ = [name for name in units if len({one.scores.get(name) for one in worst}) > 1] or list(units)
        for one in worst:
            shown = [name for name in differ if name in one.scores][:2]
            scores = ", ".join(f"{name} {one.scores[name]:.4g} {units[name]}".strip() for name in shown)
            texts = (one.label, one.reference, one.candidate)  # an array's text has all its numbers
            short = (text if len(text) <= _CELL else f"{text[: _CELL - 1]}…" for text in texts)
            rows.append((one.name, *short, scores))
        return Table("Worst samples", ("sample", "label", "reference", "candidate", "scores"), rows).without_empty()

    @property
    def environment(self) -> Table:
        """Date, machine, data, engines, versions, command."""
        first = self.validations[0]
        rows = [("date", self.date), *first.machine.items()]
        rows += [("data", first.data.source), ("samples", f"{first.samples:,}")]
        rows += [("fingerprint of the data", first.data.fingerprint)]
        for side in (side for one in self.validations for side in (one.candidate, one.reference) if side):
            kept = [f"{key} {value}" for key, value in side.items() if value and key not in _APART]
            rows.append((str(side["name"]), ", ".join(kept)))
            rows += [(f"{side['name']}: {file}", digest) for file, digest in side.get("graphs", {}).items()]
        rows += [*self.versions.items(), *([("command", self.command)] if self.command else [])]
        return Table("Environment", ("", ""), list(dict.fromkeys(rows)))


def _target(validation: Validation) -> str:
    return str(validation.candidate.get("target", ""))


def _interval(gate: Gate) -> Bar:
    """Bounds, measured value and limit, on the gate's own axis; that of a drop starts at 0 or below."""
    ends = [gate.lower, gate.upper, gate.wanted.limit, *([] if gate.wanted.what == AT_LEAST else [0.0])]
    scale = 100 / max(max(ends) - min(ends), 1e-12)
    left, right, dot, limit = (scale * (x - min(ends)) for x in (gate.lower, gate.upper, gate.measured, ends[2]))
    allowed = (limit, 100.0) if gate.wanted.what == AT_LEAST else (0.0, limit)
    return Bar(left, right - left, dot, limit, allowed)


def _lengths(values: Sequence[float]) -> list[Bar]:
    most = max([*values, 1e-12])
    return [Bar(0, 100 * max(value, 0.0) / most) for value in values]


def _bounded(found: Estimate, digits: str) -> str:
    """Value and bounds."""
    lower, upper = rounded(found.lower, digits, up=False), rounded(found.upper, digits, up=True)
    return f"{rounded(found.value, digits)} ({lower} to {upper})"


def tables(manifest: Manifest, record: Calibration | None) -> list[Table]:
    """A bundle's own tables: quantization, stages, folds, memory plan, verification."""
    found = [] if record is None else _quantization(record)
    for name, part in manifest.parts.items():
        found += part_tables(name, part)
    rows = [
        (check.output, check.inputs, f"{check.difference:.1e}", f"{check.tolerance:.0e}")
        for check in manifest.verification
    ]
    note = "Differences from PyTorch at export, as a share of the output's scale."
    found.append(Table("Verified at export", ("output", "inputs", "largest difference>", "allowed>"), rows, note))
    return [table for table in found if table.rows]


def part_tables(name: str, part: Part) -> list[Table]:
    """Stages, folds and memory plan of a part, for one sample."""
    figures = ("flops", "parameters", "weight_bytes", "activation_bytes")
    whole = Stage("all", *(sum(getattr(stage, figure) for stage in part.stages) for figure in figures))
    scale, unit = (1e9, "GFLOP") if whole.flops >= 1e9 else (1e6, "MFLOP")
    rows: list[tuple[str, ...]] = []
    for one in (*part.stages, whole):
        if one.flops or one.parameters or one.activation_bytes >= 0.01 * whole.activation_bytes > 0:
            work = (f"{one.flops / scale:,.2f}", f"{one.flops / (whole.flops or 1):.1%}", f"{one.parameters:,}")
            rows.append((one.name, *work, *_mebibytes(one.weight_bytes, one.activation_bytes)))
    columns: tuple[str, ...] = ("share>", "weights>", "MiB of weights>", "MiB read and written>")
    note = "Weights include constants such as position tables; shared ones count once."
    found = [Table(f"Part {name} ({part.file})", ("stage", f"{unit}>", *columns), rows, note)]
    rows = []
    for fold in part.folds:
        flops = (f"{fold.plain.flops / scale:,.2f}", f"{fold.folded.flops / scale:,.2f}")
        moved = _mebibytes(fold.plain.bytes, fold.folded.bytes)
        rows.append((fold.site, fold.chosen, *flops, *moved, fold.why))
    columns = ("site", "chosen", f"plain {unit}>", f"folded {unit}>", "plain MiB moved>", "folded MiB moved>", "why")
    note = "Both forms give the same result; the graph has the chosen one. An array counts at each read and write. "
    note += "Work is the FLOPs plus 10 for each byte moved."
    found.append(Table(f"Folds of {name}", columns, rows, note))
    if part.plan is not None:
        rows = [
            (stage.stage, f"{stage.at_a_time:,} of {stage.count:,} {stage.unit}", *_mebibytes(stage.bytes))
            for stage in part.plan.stages
        ] or [("all of it", "at once", *_mebibytes(part.plan.peak))]
        note = f"Activations peak at {part.plan.peak / _MIB:,.2f} MiB, of a budget of {part.plan.budget / _MIB:,g} MiB."
        found.append(Table(f"Memory plan of {name}", ("stage", "at a time", "MiB>"), rows, note))
    return [table.without_empty() for table in found if table.rows]


def _mebibytes(*sizes: float) -> list[str]:
    return [f"{size / _MIB:,.2f}" for size in sizes]


def _quantization(record: Calibration) -> list[Table]:
    left = [
        (product.name, f"{100 * product.share:.2f} %", product.reason)
        for held in record.parts.values()
        for product in held.excluded
    ]
    shares = [
        f"{name} on {one.target}: {one.share:.1%}" for name, part in record.parts.items() for one in part.coverage
    ]
    said = [
        ("scheme", record.how),
        ("other precisions", ", ".join(f"{name}: {one}" for name, one in record.precision.items()) or "none"),
        ("int8 multiply-adds in integer kernels", ", ".join(shares) or "none"),
        ("calibrated on", f"{record.data.samples:,} samples of {record.data.source}"),
        ("fingerprint", record.data.fingerprint),
        ("warnings about the data", "; ".join(record.data.warnings) or "none"),
    ]
    return [
        Table("Left in float by policy", ("product", "share of multiply-adds>", "why"), left),
        Table("Quantization", ("", ""), said),
    ]
