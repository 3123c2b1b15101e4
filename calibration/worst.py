# SPDX-License-Identifier: Apache-2.0
"""The samples and the classes that got worst, so that a person can look at them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from perceiver_export.calibration.examples import Example
from perceiver_export.calibration.metrics.base import Columns, Metric
from perceiver_export.runtimes.runtime import Array

_SIDE = 96  # pixels of a thumbnail's longer side


class WorstSample(msgspec.Struct, frozen=True):
    """A sample on which the candidate did worst. Scores are by metric, in its unit; ``picture`` is a PNG data URI."""

    index: int
    name: str
    label: str = ""
    reference: str = ""
    candidate: str = ""
    scores: dict[str, float] = {}
    picture: str = ""
    text: str = ""


class WorstClass(msgspec.Struct, frozen=True):
    """Samples of one label, in percent; without labels, of one answer of the reference. Flips: answers that differ."""

    label: str
    samples: int
    candidate: float | None
    reference: float | None
    flips: int | None

    @property
    def changed(self) -> bool:
        """Whether an answer differs from the reference's; without a reference, whether one is wrong."""
        return self.candidate != 100.0 if self.flips is None else self.flips > 0


@dataclass
class Worst:
    """Keeps the ``most`` worst samples seen. Ranked by how much quality was lost, then by distance."""

    most: int
    kept: list[tuple[tuple[float, float], int, Example, WorstSample]] = field(default_factory=list)
    seen: int = 0

    def add(
        self, batch: Sequence[Example], badness: Array, scores: Columns, answers: Mapping[str, Sequence[str]]
    ) -> None:
        """A batch: ``badness`` (n, 2), scores by metric, and what label and sides said (n texts each)."""
        for row in np.lexsort((-badness[:, 1], -badness[:, 0]))[: self.most].tolist():
            key = (float(badness[row, 0]), float(badness[row, 1]))
            if len(self.kept) < self.most or key > self.kept[-1][0]:
                values = {name: float(column.values[row]) for name, column in scores.items()}
                said = {name: texts[row] for name, texts in answers.items() if len(texts)}
                sample = WorstSample(self.seen + row, batch[row].name, scores=values, **said)
                self.kept.append((key, -self.seen - row, batch[row], sample))
                self.kept.sort(key=lambda kept: kept[:2], reverse=True)
                del self.kept[self.most :]
        self.seen += len(batch)

    def examples(self) -> tuple[Example, ...]:
        """The same, as they were given."""
        return tuple(example for _, _, example, _ in self.kept)

    def samples(self) -> tuple[WorstSample, ...]:
        """Worst first, with pictures."""
        return tuple(_shown(example, sample) for _, _, example, sample in self.kept)


def badness(quality: Columns, reference: Columns, likeness: Columns, metrics: tuple[Metric, ...], count: int) -> Array:
    """(n, 2): by how much the first quality fell (or how bad it is, alone), and how far the reference is."""
    found = np.zeros((count, 2))
    first = next((metric for metric in metrics if metric.name in quality), None)
    if first is not None:
        values = quality[first.name].values
        change = values - reference[first.name].values if reference else values
        found[:, 0] = change if first.better == "lower" else -change
    measured = sorted((metric for metric in metrics if metric.name in likeness), key=lambda m: m.better == "higher")
    if measured:  # a distance rather than a yes or no
        values = likeness[measured[0].name].values
        found[:, 1] = values if measured[0].better == "lower" else -values
    return found


def worst_classes(
    names: Sequence[str], classes: Array, right: Array | None, reference_right: Array | None, same: Array | None
) -> tuple[WorstClass, ...]:
    """A row a class that occurs, the one with the largest fall first; arrays are (n,), of booleans but ``classes``."""
    rows = []
    for index in np.unique(classes).tolist():
        of_class = classes == index
        found, expected = (
            None if side is None else 100 * float(side[of_class].mean()) for side in (right, reference_right)
        )
        flips = None if same is None else int((~same[of_class]).sum())
        rows.append(WorstClass(names[index], int(of_class.sum()), found, expected, flips))
    return tuple(sorted(rows, key=_fall, reverse=True))


def _fall(row: WorstClass) -> tuple[float, float]:
    flips = (row.flips or 0) / row.samples
    if row.candidate is None:
        return flips, 0.0
    return (row.reference - row.candidate if row.reference is not None else -row.candidate), flips


def _shown(example: Example, sample: WorstSample) -> WorstSample:
    source = example.source
    if isinstance(source, str):
        return msgspec.structs.replace(sample, text=source[:400])
    if source is None or (isinstance(source, np.ndarray) and source.dtype != np.uint8):
        return sample  # numbers as the model takes them are no picture
    return msgspec.structs.replace(sample, picture=_thumbnail(source))


def _thumbnail(source: Path | Array) -> str:
    from PIL import Image

    picture = Image.open(source) if isinstance(source, Path) else Image.fromarray(source)
    with picture:
        small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    small.save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
