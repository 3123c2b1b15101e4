# SPDX-License-Identifier: Apache-2.0
"""Pictures in, labels out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import BundleError
from perceiver_export.runtimes.frame_files import PictureLike, take_picture
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.pictures import to_input
from perceiver_export.runtimes.preprocessing import ImagePreprocessing
from perceiver_export.runtimes.tasks.base import LoadPart, Task
from perceiver_export.runtimes.tasks.graphs import (
    as_list,
    check_interface,
    check_labels,
    interface,
    limits,
    run_batched,
)
from perceiver_export.runtimes.tasks.prediction import Prediction, softmax
from perceiver_export.runtimes.tasks.ranking import check_top, rank


class ImageClassification(Task):
    """``classify(picture)`` -> the most probable labels. A picture is a path or uint8, (H, W) or (H, W, 3)."""

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        assert isinstance(manifest.preprocessing, ImagePreprocessing)  # `check` came first
        self.preprocessing: ImagePreprocessing = manifest.preprocessing
        (self._input,), (output,) = interface(manifest)
        size = output.shape[-1]
        # Labels without names are called by their index, as `rank` does.
        self.labels = manifest.labels or tuple(map(str, range(size if isinstance(size, int) else 0)))

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a classifier of pictures."""
        steps = manifest.preprocessing
        if not isinstance(steps, ImagePreprocessing):
            raise BundleError("the manifest does not say how pictures are preprocessed", "export the bundle again")
        check_interface(manifest, {"image": (3, steps.height, steps.width)}, {"logits": (None,)})
        check_labels(manifest, "logits")

    def __call__(self, picture: PictureLike, top: int = 5) -> list[Prediction]:
        """The ``top`` labels, most probable first. Raises InputError: a picture that cannot be read; UsageError."""
        check_top(top)
        return rank(softmax(self.logits([picture])[0]), self.labels, top)

    def preprocess(self, picture: PictureLike) -> npt.NDArray[np.float32]:
        """The model's input for one picture, float32 (3, height, width)."""
        return to_input(take_picture(picture), self.preprocessing)

    def logits(self, pictures: Sequence[PictureLike]) -> npt.NDArray[np.float32]:
        """Logits (len(pictures), labels), in the batches that the bundle was exported for."""
        return self.run_inputs(np.stack([self.preprocess(picture) for picture in as_list(pictures, "pictures")]))

    def run_inputs(self, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (n, labels) of preprocessed inputs (n, 3, height, width). Raises InputError: no picture."""
        return run_batched(self.runtime, {"image": inputs})["logits"]

    @property
    def batch_size(self) -> int:
        """The largest batch that one call takes."""
        return limits(self._input, 0)[1]
