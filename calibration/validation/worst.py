# SPDX-License-Identifier: Apache-2.0
"""The samples and classes on which the candidate did worst, for reports and as files."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from perceiver_export.calibration.bundles import new_directory
from perceiver_export.calibration.data.samples import Example
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.files import encode_json
from perceiver_export.runtimes.npz import write_npz
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks.image_files import take_image

_SIDE = 96  # pixels of a thumbnail's longer side


class WorstSample(msgspec.Struct, frozen=True):
    """One of the worst samples. Scores are by metric, in its unit; ``image`` is a PNG data URI.

    ``index`` is its position in the data.
    """

    index: int
    name: str
    label: str = ""
    reference: str = ""
    candidate: str = ""
    scores: dict[str, float] = {}
    image: str = ""
    text: str = ""


class WorstClass(msgspec.Struct, frozen=True):
    """Samples of one label (without labels, of one answer of the reference) and the share of right answers in percent.

    ``flips``: the number of answers that differ from the reference's.
    """

    label: str
    samples: int
    candidate: float | None
    reference: float | None
    flips: int | None

    @property
    def changed(self) -> bool:
        """Whether an answer differs from the reference's; without a reference, whether one is wrong."""
        return self.candidate != 100.0 if self.flips is None else self.flips > 0


class Worst:
    """Keeps the ``most`` worst samples, ranked by how much quality they lost, then by distance.

    ``kept``: each with its badness and its inputs, which are missing for samples from shards.
    """

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, 0
        self.kept: list[tuple[tuple[float, ...], WorstSample, Example | None]] = []

    def add(
        self,
        batch: Sequence[Example],
        badness: Array,
        scores: Mapping[str, Array],
        answers: Mapping[str, Sequence[str]],
    ) -> None:
        """Add a batch: ``badness`` (n, 2), scores (n,) by metric, and texts (n) of the label and of both answers."""
        for row in np.lexsort((-badness[:, 1], -badness[:, 0]))[: self.most].tolist():
            values = {name: float(column[row]) for name, column in scores.items()}
            said = {name: texts[row] for name, texts in answers.items()}
            sample = WorstSample(batch[row].position, batch[row].name, scores=values, **said)
            self.keep(tuple(badness[row].tolist()), sample, batch[row])
        self.seen += len(batch)

    def keep(self, badness: tuple[float, ...], sample: WorstSample, example: Example | None = None) -> None:
        """Keep a sample if it is among the worst; of equal ones, the first."""
        self.kept.append((badness, sample, example))
        self.kept = heapq.nlargest(self.most, self.kept, key=lambda kept: (kept[0], -kept[1].index))

    def samples(self) -> tuple[WorstSample, ...]:
        """Worst first, with thumbnails."""
        return tuple(sample if example is None else _shown(example, sample) for _, sample, example in self.kept)


def worst_classes(
    names: Sequence[str], classes: Array, right: Array | None, reference_right: Array | None, same: Array | None
) -> tuple[WorstClass, ...]:
    """One row per class that occurs, the largest drop first. ``classes`` are indices (n,), the others booleans (n,)."""
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
    return (flips, 0.0) if row.candidate is None else ((row.reference or 0.0) - row.candidate, flips)


def _shown(example: Example, sample: WorstSample) -> WorstSample:
    source = example.source
    if isinstance(source, str):
        return msgspec.structs.replace(sample, text=source[:400])
    if source is None or (isinstance(source, np.ndarray) and source.dtype != np.uint8):
        return sample  # preprocessed numbers are not an image
    from PIL import Image

    small, content = Image.fromarray(take_image(source)), io.BytesIO()
    small.thumbnail((_SIDE, _SIDE))
    small.save(content, "PNG", optimize=True)
    image = base64.b64encode(content.getvalue()).decode()
    return msgspec.structs.replace(sample, image=f"data:image/png;base64,{image}")


OPTION = "--save-worst"


def write_worst(
    path: Path, samples: Sequence[WorstSample], examples: Sequence[Example], classes: Sequence[WorstClass]
) -> None:
    """Write NN.npz, NN.png or NN.txt per sample, worst.json, and classes.json for classifiers. Raises DataError.

    Either all files are written or none.
    """
    with new_directory(path, OPTION, DataError) as temporary:
        for number, (sample, example) in enumerate(zip(samples, examples, strict=True)):
            targets = {f"target_{name}": target for name, target in example.targets.items()}
            write_npz(temporary / f"{number:02}.npz", {**example.feeds, **targets})
            if sample.image:
                content = base64.b64decode(sample.image.partition(",")[2])
                (temporary / f"{number:02}.png").write_bytes(content)
            if sample.text:
                (temporary / f"{number:02}.txt").write_text(sample.text, encoding="utf-8", errors="replace")
        listed = [msgspec.structs.replace(sample, image="") for sample in samples]
        (temporary / "worst.json").write_bytes(encode_json(listed))
        if classes:
            (temporary / "classes.json").write_bytes(encode_json(classes))
