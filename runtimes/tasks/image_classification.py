# SPDX-License-Identifier: Apache-2.0
"""Pictures in, labels out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import BundleError, UsageError
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.pictures import read_picture, to_input
from perceiver_export.runtimes.preprocessing import ImagePreprocessing
from perceiver_export.runtimes.tasks.base import LoadPart, Task
from perceiver_export.runtimes.tasks.graphs import interface, limits
from perceiver_export.runtimes.tasks.prediction import Prediction, softmax

__all__ = ["ImageClassification", "PictureLike", "Prediction", "softmax"]

PictureLike = str | os.PathLike[str] | npt.NDArray[np.uint8]


class ImageClassification(Task):
    """``classify(picture)`` -> the most probable labels. A picture is a path or uint8, (H, W) or (H, W, 3)."""

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        assert isinstance(manifest.preprocessing, ImagePreprocessing)  # `check` came first
        self.labels = manifest.labels
        self.preprocessing = manifest.preprocessing
        (self._input,), (self._output,) = interface(manifest)

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a classifier of pictures."""
        steps = manifest.preprocessing
        if not isinstance(steps, ImagePreprocessing) or not manifest.labels:
            raise BundleError("the manifest has no picture preprocessing or no labels", "export the bundle again")
        takes, gives = ([spec.shape[1:] for spec in specs] for specs in interface(manifest))
        if takes != [(3, steps.height, steps.width)] or gives != [(len(manifest.labels),)]:
            raise BundleError(
                f"{len(manifest.labels)} labels and pictures of {steps.height} × {steps.width} do not fit the graph",
                "export the bundle again",
            )

    def __call__(self, picture: PictureLike, top: int = 5) -> list[Prediction]:
        """The ``top`` labels, most probable first. Raises InputError where the picture cannot be read."""
        if top < 1:
            raise UsageError(f"top is {top}", "ask for 1 or more labels")
        probabilities = softmax(self.logits([picture])[0])
        best = np.argsort(-probabilities, kind="stable")[:top]
        return [Prediction(self.labels[i], int(i), float(probabilities[i])) for i in best]

    def preprocess(self, picture: PictureLike) -> npt.NDArray[np.float32]:
        """The model's input for one picture, float32 (3, height, width)."""
        array = picture if isinstance(picture, np.ndarray) else read_picture(picture)
        return to_input(array, self.preprocessing)

    def logits(self, pictures: Sequence[PictureLike]) -> npt.NDArray[np.float32]:
        """Logits (len(pictures), labels), in the batches that the bundle was exported for."""
        return self.run_inputs(np.stack([self.preprocess(picture) for picture in pictures]))

    def run_inputs(self, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (n, labels) of preprocessed inputs (n, 3, height, width); a last short batch is padded."""
        batch = self.batch_size
        rows: list[npt.NDArray[Any]] = []
        for start in range(0, len(inputs), batch):
            chunk = inputs[start : start + batch]
            kept = len(chunk)
            if kept < self._least_batch:
                chunk = np.concatenate([chunk, np.repeat(chunk[-1:], self._least_batch - kept, axis=0)])
            rows.append(self.runtime.run({self._input.name: chunk})[self._output.name][:kept])
        return np.concatenate(rows)

    @property
    def batch_size(self) -> int:
        """The largest batch that one call takes."""
        return limits(self._input, 0)[1]

    @property
    def _least_batch(self) -> int:
        return limits(self._input, 0)[0]
