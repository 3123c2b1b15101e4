# SPDX-License-Identifier: Apache-2.0
"""Validation in shards: each machine judges a share of the samples and writes a file; `merge` judges all of them.

Shard i of n has the samples at positions i − 1, i − 1 + n, …, on any machine. Its file has the values of each sample,
and sums that add up, so merged shards give the result of one run, bit for bit, if the engines do. The exceptions are
the naive models of your own metric and of arrays of any meaning, whose sums round. A file is checked against the others
and the bundle, but nothing proves that its numbers were measured: only accept files from machines that you trust.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from perceiver_export.calibration.bundles import identity
from perceiver_export.calibration.data.fingerprints import DataWatch
from perceiver_export.calibration.data.samples import Notes
from perceiver_export.calibration.validation.certify import check_certifiable
from perceiver_export.calibration.validation.gates import check_gates
from perceiver_export.calibration.validation.metrics import families
from perceiver_export.calibration.validation.metrics.base import Column
from perceiver_export.calibration.validation.options import MOST_SHARDS, ValidateOptions, check_shard
from perceiver_export.calibration.validation.reference import check_reference
from perceiver_export.calibration.validation.results import Data, Validation
from perceiver_export.calibration.validation.scores import Scores, joined
from perceiver_export.calibration.validation.validation import Measured, Progress, judged, measure
from perceiver_export.calibration.validation.worst import WorstSample
from perceiver_export.runtimes.bundle import Bundle, BundleLike, open_bundle
from perceiver_export.runtimes.certificates import engine_of, on_cpu
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.files import encode_json, parsing, read_json
from perceiver_export.runtimes.runtime import Array

_LIMIT = 256 << 20  # bytes of a file
_AGAIN = "run that shard again, with the files and options of the others"


class Numbers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A float64 array and the weights of its rows; without weights, each is 1."""

    shape: tuple[int, ...]
    values: list[float]
    weights: list[float] = []

    @classmethod
    def of(cls, array: Array, weights: Array | None = None) -> Numbers:
        """From arrays."""
        given = [] if weights is None or (weights == 1).all() else weights.tolist()
        return cls(array.shape, array.astype(np.float64).ravel().tolist(), given)

    @property
    def array(self) -> Array:
        """The values. Raises ValueError if there are too many or too few."""
        return np.array(self.values, np.float64).reshape(self.shape)

    def column(self, count: int) -> Column:
        """A column with its weights, for ``count`` samples. Raises ValueError."""
        found = Column.of(self.array, np.array(self.weights, np.float64) if self.weights else None)
        if not len(found.values) == len(found.weights) == count:
            raise ValueError(f"a column has {len(found.values):,} values for {count:,} samples")
        return found


class Worst(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the worst samples, with its rank by `scores.Scores`."""

    badness: tuple[float, ...]
    sample: WorstSample


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shard ``shard`` of ``shards``. ``bundle``: its `identity`.

    ``rows``: SHA-256 of the names and contents of all ``total`` samples of the data. ``columns`` have a row for each of
    ``positions``. ``digest``: SHA-256 of everything else.
    """

    shard: int
    shards: int
    bundle: str
    package: str
    metric: str | None
    truncate: bool
    total: int
    rows: str
    source: str
    candidate: dict[str, Any]
    reference: dict[str, Any] | None
    machine: dict[str, str]
    positions: list[int]
    digests: list[str]
    judged: list[str]
    labels: dict[str, int]
    bounds: dict[str, tuple[float, float]]
    notes: Notes
    columns: dict[str, dict[str, Numbers]]
    sums: list[dict[str, Numbers]]
    reads: dict[str, tuple[str, ...]]
    unused: list[str]
    worst: list[Worst]
    digest: str = ""

    def signed(self) -> Shard:
        """A copy with ``digest`` filled in."""
        content = encode_json(msgspec.structs.replace(self, digest=""), indent=0)
        return msgspec.structs.replace(self, digest=hashlib.sha256(content).hexdigest())

    @property
    def alike(self) -> dict[str, object]:
        """By name: the facts that all shards of one validation share."""
        return {
            "bundle": self.bundle,
            "number of shards": self.shards,
            "data": (self.total, self.rows, self.truncate, self.notes.count),
            "reference": None if self.reference is None else self.reference.get("graphs"),
            "metric": self.metric,
            "set of values": (
                {side: sorted(found) for side, found in self.columns.items()},
                list(map(sorted, self.sums)),
            ),
            "version of perceiver-export": self.package,
        }

    @property
    def alike_there(self) -> dict[str, object]:
        """By name: further facts that shards of one place share."""
        side = self.reference or {}
        return {"reference's target or engine": (side.get("target"), engine_of(side))}

    @property
    def results(self) -> tuple[object, ...]:
        """Everything that is the same if a shard runs again in the same place."""
        return self.positions, self.digests, self.judged, self.columns, self.sums

    @property
    def place(self) -> str:
        """Target, engine and instruction set; on targets other than CPUs, the device as well."""
        target, instructions = str(self.candidate["target"]), self.machine["instruction set"]
        device = "" if on_cpu(target) else f" on {self.candidate.get('device')}"
        return f"{target}{device}, {engine_of(self.candidate)}, {instructions}"


def validate_shard(
    bundle: BundleLike,
    data: str | Path,
    shard: tuple[int, int],
    options: ValidateOptions = ValidateOptions(),
    *,
    progress: Progress | None = None,
) -> Shard:
    """Judge shard i of n of the samples. Raises the errors of `validate`, and UsageError for gates."""
    _check_shardable(shard, options)
    measured = measure(bundle, data, options, progress, shard)
    found, scores, watch = measured.found, measured.scores, measured.watch
    found.require()
    return Shard(
        shard=shard[0],
        shards=shard[1],
        bundle=identity(open_bundle(bundle, "never")),
        package=importlib.metadata.version("perceiver-export"),
        metric=options.gates.own,
        truncate=options.truncate,
        total=measured.total,
        rows=measured.rows,
        notes=measured.notes,
        labels=dict(watch.labels),
        columns={
            side: {name: Numbers.of(one.values, one.weights) for name, one in columns.items()}
            for side, columns in scores.sides.items()
        },
        sums=[{name: Numbers.of(np.asarray(one)) for name, one in sums.items()} for sums in scores.sums],
        reads=scores.reads,
        unused=sorted(scores.unused),
        worst=[Worst(kept[0], sample) for kept, sample in zip(scores.worst.kept, scores.worst.samples(), strict=True)],
        source=watch.source,
        positions=watch.positions,
        digests=watch.digests,
        judged=watch.judged,
        bounds=watch.bounds,
        candidate=found.candidate,
        reference=found.reference,
        machine=found.machine,
    ).signed()


def _check_shardable(shard: tuple[int, int], options: ValidateOptions) -> None:
    """Raise UsageError if the number is out of range, or for options that a shard cannot have."""
    check_shard(shard)
    late = options.gates.any or options.certify or options.allow_overlap
    if late or options.sequential or options.save_worst is not None or options.device == "all":
        said = "a shard runs to its end on one target, without gates, a certificate or saved worst samples"
        raise UsageError(said, "give gates, --certify and --allow-overlap to --merge; leave --save-worst out")


def encode_shard(shard: Shard) -> bytes:
    """The content of a shard's file. Raises DataError if it is larger than `merge` reads."""
    content = encode_json(shard, indent=0)
    if len(content) > _LIMIT:
        raise DataError(f"the shard takes {len(content):,} bytes, more than {_LIMIT:,}", "use more shards")
    return content


def merge(
    bundle: BundleLike, files: Sequence[Path], options: ValidateOptions = ValidateOptions()
) -> tuple[Validation, ...]:
    """One result for each target, engine and instruction set that shards ran on; each needs all shards.

    A shard that ran twice there counts once. Raises DataError if a file is missing, cannot be read, or is from another
    validation, and UsageError for gates that do not fit.
    """
    opened = open_bundle(bundle)
    if options.certify:
        check_certifiable(bundle)
    if options.sequential or options.save_worst is not None:
        raise UsageError("merged shards are not run again", "leave --sequential and --save-worst out")
    if not files:
        raise UsageError("no shards were given", "name their files: validate BUNDLE --merge part*.json --max-drop 0.6")
    shards = {file: _read(file) for file in files}
    first, expected = next(iter(shards.items()))
    places = _by_place(shards)
    if expected.bundle != identity(opened):
        raise DataError(f"{first} is not from the bundle {opened.path}", "give the bundle that the shards judged")
    for place, found in places.items():
        if missing := [f"{index}/{expected.shards}" for index in range(1, expected.shards + 1) if index not in found]:
            said = f"{len(missing)} of {expected.shards} shards are missing on {place}: {', '.join(missing[:20])}"
            raise DataError(said, "run them there and merge again, or leave out the files of other machines")
    with parsing(str(first), "and the other shards do not fit this bundle", _AGAIN, DataError):
        _check_options(options, expected)
        return tuple(_judged(opened, [found[index] for index in sorted(found)], options) for found in places.values())


def _check_options(options: ValidateOptions, shard: Shard) -> None:
    """Raise UsageError if the options ask for another metric or reference than the shards used."""
    if options.gates.own != shard.metric:
        said = f"with --metric {shard.metric}" if shard.metric else f"without --metric {options.gates.own}"
        raise UsageError(f"the shards were judged {said}", "give the same to the shards and to --merge")
    if options.against is not None:
        graphs: dict[str, str] = (shard.reference or {}).get("graphs", {})
        files: dict[str, str] = {}
        if not callable(options.against):
            manifest = open_bundle(options.against, "never").manifest
            files = {name: entry.sha256 for name, entry in manifest.files.items()}
        if not graphs or not graphs.items() <= files.items():
            said = f"the shards were judged against another reference than {options.against}"
            raise UsageError(said, "give theirs, or leave --against out")


def _by_place(shards: Mapping[Path, Shard]) -> dict[str, dict[int, Shard]]:
    """The shards by place and number. Raises DataError if they do not belong together."""
    places: dict[str, dict[int, Shard]] = {}
    firsts: dict[str, tuple[Path, dict[str, object]]] = {}
    for file, one in shards.items():
        for where, facts in (("", one.alike), (one.place, one.alike_there)):
            first, expected = firsts.setdefault(where, (file, facts))
            for words, value in facts.items():
                if value != expected[words]:
                    raise DataError(f"{file} differs from {first} in its {words}", _AGAIN)
        if places.setdefault(one.place, {}).setdefault(one.shard, one).results != one.results:
            said = f"{file} and an earlier file of shard {one.shard}/{one.shards} have different results"
            raise DataError(said, "leave one of the two out, and find out why they differ")
    return places


def _read(file: Path) -> Shard:
    """Read a shard and check that it is complete. Raises DataError."""
    shard = read_json(file, Shard, DataError, _AGAIN, _LIMIT)
    if shard.digest != shard.signed().digest:
        raise DataError(f"{file} was changed or cut after it was written", _AGAIN)
    if "target" not in shard.candidate or "instruction set" not in shard.machine:
        raise DataError(f"{file} does not name the target and the instruction set that it ran on", _AGAIN)
    found = sorted([*shard.positions, *shard.notes.left_out])
    if 1 <= shard.shard <= shard.shards <= MOST_SHARDS and shard.total <= shard.shards * (len(found) + 1):
        expected = [*range(shard.shard - 1, shard.total, shard.shards)]
        if found == expected and 0 < len(shard.positions) == len(shard.digests) == len(shard.judged):
            return shard
    raise DataError(f"{file} does not hold the samples of shard {shard.shard}/{shard.shards}", _AGAIN)


def _judged(bundle: Bundle, shards: Sequence[Shard], options: ValidateOptions) -> Validation:
    first = shards[0]
    scores = Scores(families(bundle.manifest, options.gates.own), options.worst, bundle.manifest.labels)
    check_gates(options.gates, scores.metrics, first.reference is not None)
    if options.certify:
        check_reference(first.candidate, first.reference)
    _fill(scores, shards)
    watch, notes = DataWatch(bundle.manifest, first.source), Notes(first.notes.count, unlisted=first.notes.unlisted)
    for one in shards:
        watch.digests += one.digests
        watch.judged += one.judged
        watch.labels.update(one.labels)
        for name, ends in one.bounds.items():
            watch.widen(name, *ends)
        for kind, said in one.notes.labels.items():
            notes.labels.setdefault(kind, said)
        notes.left_out |= one.notes.left_out
        notes.cut |= one.notes.cut
    data = Data(first.source, scores.count, "")
    found = Validation(bundle.manifest.task, first.candidate, first.reference, data, machine=first.machine)
    return judged(bundle, Measured(found, scores, watch, notes), options)


def _fill(scores: Scores, shards: Sequence[Shard]) -> None:
    """Fill in the scores of all samples in order. Raises ValueError and others if the shards do not fit."""
    order = np.argsort([position for one in shards for position in one.positions])
    for side, columns in shards[0].columns.items():
        parts = {name: [one.columns[side][name].column(len(one.positions)) for one in shards] for name in columns}
        scores.parts[side] = [{name: joined(found, order) for name, found in parts.items()}]
    for sums, *added in zip(scores.sums, *(one.sums for one in shards), strict=True):
        for name in added[0]:
            arrays = [one[name].array for one in added]
            if len({array.shape for array in arrays}) > 1:
                raise ValueError(f"{name} has several shapes")
            sums[name] = functools.reduce(np.add, arrays)
    scores.unused = {name for one in shards for name in one.unused}
    scores.reads = {
        name: tuple(dict.fromkeys(output for one in shards for output in one.reads[name])) for name in shards[0].reads
    }
    scores.worst.seen = len(order)
    for one in shards:
        for worst in one.worst:
            scores.worst.keep(worst.badness, worst.sample)
