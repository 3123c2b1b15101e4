# SPDX-License-Identifier: Apache-2.0
"""Pictures in, labels out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import BundleError, UsageError
from perceiver_export.runtimes.manifest import ImagePreprocessing, Manifest
from perceiver_export.runtimes.pictures import read_picture, to_input
from perceiver_export.runtimes.runtime import Runtime

PictureLike = str | os.PathLike[str] | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """A label, its index and its probability (softmax of the logits)."""

    label: str
    index: int
    probability: float


class ImageClassification:
    """``classify(picture)`` -> the most probable labels. A picture is a path or uint8, (H, W) or (H, W, 3)."""

    def __init__(self, manifest: Manifest, runtime: Runtime) -> None:
        assert manifest.preprocessing is not None  # `check` came first
        self.runtime = runtime
        self.labels = manifest.labels
        self.preprocessing: ImagePreprocessing = manifest.preprocessing
        (self._input,), (self._output,) = runtime.inputs, runtime.outputs

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a classifier of pictures."""
        steps, part = manifest.preprocessing, next(iter(manifest.parts.values()))
        if steps is None or not manifest.labels:
            raise BundleError("the manifest has no picture preprocessing or no labels", "export the bundle again")
        takes, gives = ([spec.shape[1:] for spec in specs] for specs in (part.inputs, part.outputs))
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
        size = self._input.shape[0]
        return size if isinstance(size, int) else self._input.ranges[size][1]

    @property
    def _least_batch(self) -> int:
        size = self._input.shape[0]
        return size if isinstance(size, int) else self._input.ranges[size][0]

    def close(self) -> None:
        """Close the runtime."""
        self.runtime.close()

    def __enter__(self) -> ImageClassification:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Probabilities along the last axis."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: npt.NDArray[np.float32] = exponents / exponents.sum(axis=-1, keepdims=True)
    return probabilities
