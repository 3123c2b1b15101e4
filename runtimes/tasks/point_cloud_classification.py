# SPDX-License-Identifier: Apache-2.0
"""Point clouds in, labels out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import BundleError, InputError
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.point_files import as_points, into_unit_cube, read_points, subsample
from perceiver_export.runtimes.preprocessing import PointsPreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks.base import LoadPart, Task
from perceiver_export.runtimes.tasks.graphs import (
    Shape,
    as_list,
    check_interface,
    check_labels,
    interface,
    run_batched,
)
from perceiver_export.runtimes.tasks.prediction import Prediction, softmax
from perceiver_export.runtimes.tasks.ranking import check_top, rank

CloudLike = str | os.PathLike[str] | npt.NDArray[Any] | Sequence[Sequence[float]]


class PointCloudClassification(Task):
    """``classify(cloud)`` -> the most probable labels. A cloud is a .npy, .xyz or ASCII .ply file, or numbers (n, 3).

    Of more points than the model takes every (n/num_points)-th is taken; the points left are moved to mean 0 and
    scaled into the cube [-1, 1]. Fewer are padded with points that the model does not see (``points_mask``).
    """

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        assert isinstance(manifest.preprocessing, PointsPreprocessing)  # `check` came first
        self.num_points = manifest.preprocessing.num_points
        self._masked = _masked(manifest)

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a classifier of point clouds."""
        steps = manifest.preprocessing
        if not isinstance(steps, PointsPreprocessing):
            raise BundleError("the manifest does not say how points are preprocessed", "export the bundle again")
        inputs: dict[str, Shape] = {"points": (steps.num_points, 3)}
        if _masked(manifest):
            inputs["points_mask"] = (steps.num_points,)
        check_interface(manifest, inputs, {"logits": (None,)})
        check_labels(manifest, "logits")

    def __call__(self, cloud: CloudLike, top: int = 5) -> list[Prediction]:
        """The ``top`` labels, most probable first. Raises InputError: a cloud that is not one; UsageError."""
        check_top(top)
        return rank(softmax(self.logits([cloud])[0]), self.manifest.labels, top)

    def preprocess(self, cloud: CloudLike) -> dict[str, Array]:
        """The model's inputs of one cloud: ``points`` (1, num_points, 3), and ``points_mask`` where it has one."""
        points = read_points(cloud) if isinstance(cloud, (str, os.PathLike)) else as_points(cloud)
        missing = self.num_points - len(points)
        if missing > 0 and not self._masked:
            raise InputError(
                f"points in the cloud: {len(points)}",
                f"the model has no mask for padding and needs {self.num_points}; sample more from the surface",
            )
        rows = into_unit_cube(subsample(points, self.num_points))
        feeds: dict[str, Array] = {"points": np.pad(rows, ((0, max(missing, 0)), (0, 0)))[None]}
        if self._masked:
            feeds["points_mask"] = (np.arange(self.num_points) < len(rows)).astype(np.int32)[None]
        return feeds

    def logits(self, clouds: Sequence[CloudLike]) -> npt.NDArray[np.float32]:
        """Logits (len(clouds), labels), in the batches that the bundle was exported for."""
        samples = [self.preprocess(cloud) for cloud in as_list(clouds, "point clouds")]
        return self.run_inputs({name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]})

    def run_inputs(self, feeds: Feeds) -> npt.NDArray[np.float32]:
        """Logits (n, labels) of preprocessed inputs of n clouds."""
        return run_batched(self.runtime, feeds)["logits"]


def _masked(manifest: Manifest) -> bool:
    return any(spec.name == "points_mask" for spec in interface(manifest)[0])
