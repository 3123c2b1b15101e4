# SPDX-License-Identifier: Apache-2.0
"""Identify data by digests of its samples, warn about doubtful data, and find samples that two sets share."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
import numpy as np

from perceiver_export.calibration.data.samples import Example, Samples, digest_of
from perceiver_export.calibration.data.sources import RANDOM, is_mask
from perceiver_export.runtimes.bundle import Bundle, BundleLike, open_bundle
from perceiver_export.runtimes.certificates import FILE
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.files import read_json
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.preprocessing import FlowPreprocessing, ImagePreprocessing, VideoPreprocessing
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks.image_files import values_of
from perceiver_export.runtimes.tasks.tokenizers import tokenizer_of

ENOUGH = 32  # with 32 images PTQ4ViT (arXiv 2111.12293) is within 0.1 points of its result with 128


class DataReport(msgspec.Struct, frozen=True):
    """A description of data. ``digests`` has one per sample, of its inputs without labels; ``fingerprint`` combines
    them in a way that does not depend on their order.
    """

    source: str
    samples: int
    fingerprint: str
    digests: tuple[str, ...]
    warnings: tuple[str, ...]


class DataWatch:
    """Sees every sample once, and keeps its digest, the counts of ``labels``, and the ``bounds`` of each input."""

    def __init__(self, manifest: Manifest, source: str) -> None:
        self.manifest, self.source = manifest, source
        self.digests: list[str] = []
        self.judged: list[str] = []  # digests of inputs and targets
        self.positions: list[int] = []
        self.labels: Counter[str] = Counter()
        self._labelled: set[tuple[str, ...]] = set()
        self._unused: set[str] = set()
        self.bounds: dict[str, tuple[float, float]] = {}
        self._first: dict[str, tuple[Array, bool]] = {}  # by input: the first array, and whether all others equal it

    def see(self, example: Example) -> None:
        """Record a sample."""
        for name, array in example.feeds.items():
            first, same = self._first.get(name, (array, True))
            self._first[name] = first, same and np.array_equal(first, array)
            self.widen(name, float(array.min()), float(array.max()))
        self._unused |= {name for name, array in example.targets.items() if array.ndim and name not in example.feeds}
        if example.labels:
            self._labelled.add(example.labels)
            self.labels.update(example.labels)
        self.digests.append(example.digest)
        self.judged.append(example.digest + digest_of(example.targets))
        self.positions.append(example.position)

    def widen(self, name: str, low: float, high: float) -> None:
        """Widen the bounds of an input."""
        least, most = self.bounds.get(name, (low, high))
        self.bounds[name] = min(least, low), max(most, high)

    def report(self, notes: Sequence[str] = ()) -> DataReport:
        """The description of the data for calibration.json, with warnings and the reader's ``notes``."""
        count, repeated = len(self.digests), len(self.digests) - len(set(self.digests))
        one_class = count > 1 and len(self._labelled) == 1 and len(self.manifest.labels) > 1
        unused = sorted(self._unused - {"label", "flow"}) if self.manifest.task not in ("sets", "arrays") else []
        same = [name for name, (_, equal) in self._first.items() if equal and not is_mask(name)] if count > 1 else []
        doubts = {
            "calibrated on random numbers: expect no accuracy": self.source == RANDOM,
            f"only {count} calibration sample{'s' if count != 1 else ''}: give {ENOUGH} or more": count < ENOUGH,
            f"{repeated} of {count} samples are repeated": repeated,
            f"all samples have the same label, {next(iter(self.labels), '')!r}": one_class,
            f"the model has no input {', '.join(map(repr, unused))}, so it was not used": unused,
            **{f"input {name!r} is the same in all samples": True for name in same},
        }
        warnings = [said for said, doubtful in doubts.items() if doubtful] + self.out_of_range()
        return DataReport(self.source, count, fingerprint(self.digests), tuple(self.digests), (*warnings, *notes))

    def out_of_range(self) -> list[str]:
        """A warning for each input outside its preprocessing's range: that step may be missing, doubled or wrong."""
        warnings = []
        for name, (low, high) in self.bounds.items():
            least, most = _allowed(self.manifest, name)
            if low < least - 1e-3 or high > most + 1e-3:
                warnings.append(
                    f"input {name!r} is in {low:.3g} … {high:.3g}, but preprocessing as in training gives "
                    f"{least:.3g} … {most:.3g}"
                )
        return warnings


def _allowed(manifest: Manifest, name: str) -> tuple[float, float]:
    """The smallest and the largest value that preprocessing can produce."""
    steps = manifest.preprocessing
    if isinstance(steps, ImagePreprocessing) and name == "image":
        ends = values_of(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8), steps)
        overshoot = 0.5 * float(np.ptp(ends))  # bicubic resampling overshoots its pixels
        return float(ends.min()) - overshoot, float(ends.max()) + overshoot
    if isinstance(steps, FlowPreprocessing | VideoPreprocessing) and name in ("frames", "audio"):
        return (0.0 if isinstance(steps, VideoPreprocessing) and name == "frames" else -1.0), 1.0
    return -np.inf, np.inf


def fingerprint(digests: Sequence[str]) -> str:
    """One hash of a set of samples from their digests, independent of their order."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


class _Digests(msgspec.Struct):
    digests: tuple[str, ...]


class _Used(msgspec.Struct):
    """The fields of a quantized bundle's calibration.json that this module reads."""

    data: _Digests
    searched: tuple[str, ...] = ()


def calibrated_on(bundle: BundleLike) -> frozenset[str]:
    """Digests of the samples that determined a quantized bundle's ranges and precisions; empty for a float bundle.

    Raises BundleError if calibration.json cannot be read.
    """
    opened = open_bundle(bundle, "never")
    if FILE not in opened.manifest.files or opened.manifest.quantization is None:
        return frozenset()
    used = read_json(opened.file(FILE), _Used, hint="copy or quantize the bundle again")
    return frozenset((*used.data.digests, *used.searched))


def check_overlap(digests: Sequence[str], used: Collection[str], data: str, allowed: bool) -> dict[str, str]:
    """Warnings by kind: ``overlap`` and ``repeated``. Unless ``allowed``, raises DataError instead."""
    again, repeated = sum(digest in used for digest in digests), len(digests) - len(set(digests))
    of = f"of {len(digests):,} samples of {data}"
    found = {}
    if again:
        found["overlap"] = f"{again:,} {of} were used in calibration or search, so the results are too good"
    if repeated:
        found["repeated"] = f"{repeated:,} {of} are repeated, so the bounds are too narrow"
    if found and not allowed:
        hint = "certify on new samples, each given once, or use --allow-overlap to certify anyway"
        raise DataError("; ".join(found.values()), hint)
    return found


def check_splits(
    bundle: Bundle, calibrate: str | Path, search_on: str | Path, certify_on: str | Path, allowed: bool
) -> tuple[str, ...]:
    """The digests of the samples to search on.

    Raises DataError, unless ``allowed``, if two of a search's three sets share samples, or one repeats samples.
    """
    tokenizer = tokenizer_of(bundle)
    calibration, searched, certified = (
        [one.digest for one in Samples(data, bundle.manifest, judged=True, tokenizer=tokenizer).stream]
        for data in (calibrate, search_on, certify_on)
    )
    check_overlap(searched, frozenset(calibration), str(search_on), allowed)
    check_overlap(certified, frozenset(calibration) | frozenset(searched), str(certify_on), allowed)
    return tuple(searched)
