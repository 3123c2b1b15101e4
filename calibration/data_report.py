# SPDX-License-Identifier: Apache-2.0
"""What calibration data was: fingerprints of every sample and of the set, and what makes one doubt it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import msgspec
import numpy as np

from perceiver_export.calibration.feeds import Example
from perceiver_export.calibration.masks import is_mask
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.preprocessing import FlowPreprocessing, ImagePreprocessing, VideoPreprocessing
from perceiver_export.runtimes.runtime import Array

Bounds = dict[str, tuple[float, float]]  # the least and the largest value of each input

ENOUGH = 32  # PTQ4ViT (arXiv 2111.12293) finds 32 pictures within 0.1 points of 128


class DataReport(msgspec.Struct, frozen=True):
    """``fingerprint`` does not depend on the order of samples; ``digests`` are of each sample's inputs (no labels)."""

    source: str
    samples: int
    fingerprint: str
    digests: tuple[str, ...]
    warnings: tuple[str, ...]


class DataWatch:
    """Sees every sample once, keeps 16 characters of each and a few bounds."""

    def __init__(self, manifest: Manifest, source: str) -> None:
        self._manifest, self._source = manifest, source
        self.digests: list[str] = []
        self._labels: Counter[int] = Counter()
        self._first: dict[str, bytes] = {}
        self._varies: set[str] = set()
        self._bounds: Bounds = {}

    def see(self, example: Example) -> str:
        """Take note of a sample, and give its digest."""
        digest = hashlib.sha256()
        for name, array in sorted(example.feeds.items()):
            content = array.tobytes()
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + content)
            own = hashlib.sha256(content).digest()
            if self._first.setdefault(name, own) != own:
                self._varies.add(name)
        widen(self._bounds, example.feeds)
        if example.label is not None:
            self._labels[example.label] += 1
        self.digests.append(digest.hexdigest()[:16])
        return self.digests[-1]

    def report(self) -> DataReport:
        """What was seen."""
        whole = hashlib.sha256("".join(sorted(self.digests)).encode()).hexdigest()
        return DataReport(self._source, len(self.digests), whole, tuple(self.digests), tuple(self._warnings()))

    def _warnings(self) -> list[str]:
        warnings = []
        count = len(self.digests)
        if self._source == "random":
            warnings.append("calibrated on random numbers: no accuracy can be expected of it")
        if count < ENOUGH:
            warnings.append(f"{count} sample{'s' if count != 1 else ''} to calibrate on: give {ENOUGH} or more")
        if len(set(self.digests)) < count:
            warnings.append(f"{count - len(set(self.digests))} of {count} samples are repeated")
        if count > 1 and len(self._labels) == 1 and len(self._manifest.labels) > 1:
            warnings.append(f"all samples are of one class, {self._manifest.labels[next(iter(self._labels))]!r}")
        for name in self._bounds if count > 1 else ():
            if name not in self._varies and not is_mask(name):
                warnings.append(f"input {name!r} is the same in all samples")
        return [*warnings, *out_of_range(self._manifest, self._bounds)]


def widen(bounds: Bounds, feeds: Mapping[str, Array]) -> None:
    """Take arrays into the bounds of their inputs."""
    for name, array in feeds.items():
        low, high = bounds.get(name, (np.inf, -np.inf))
        bounds[name] = (min(low, float(array.min())), max(high, float(array.max())))


def out_of_range(manifest: Manifest, bounds: Bounds) -> list[str]:
    """A warning of each input that preprocessing cannot have given: it was prepared otherwise, twice, or not at all."""
    warnings = []
    for name, (low, high) in bounds.items():
        least, most = _allowed(manifest, name)
        if low < least - 1e-3 or high > most + 1e-3:
            warnings.append(
                f"input {name!r} goes from {low:.3g} to {high:.3g}, prepared as in training it lies in"
                f" {least:.3g} … {most:.3g}"
            )
    return warnings


def _allowed(manifest: Manifest, name: str) -> tuple[float, float]:
    """The least and the largest value that preprocessing can give."""
    steps = manifest.preprocessing
    if isinstance(steps, ImagePreprocessing) and name == "image":
        ends = [(value * steps.scale - m) / s for value in (0, 255) for m, s in zip(steps.mean, steps.std, strict=True)]
        overshoot = 0.5 * (max(ends) - min(ends))  # bicubic resampling swings beyond its pixels
        return min(ends) - overshoot, max(ends) + overshoot
    if isinstance(steps, FlowPreprocessing) and name == "frames":
        return -1.0, 1.0
    if isinstance(steps, VideoPreprocessing) and name in ("frames", "audio"):
        return (0.0, 1.0) if name == "frames" else (-1.0, 1.0)
    return -np.inf, np.inf
