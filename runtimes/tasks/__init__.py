# SPDX-License-Identifier: Apache-2.0
"""Tasks: what comes before and after a bundle's graphs, in numpy. `open_task` picks by the manifest."""

from __future__ import annotations

import importlib
import os
from typing import Any

from perceiver_export.runtimes.bundle import Bundle, Verify, open_bundle
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.errors import BundleError
from perceiver_export.runtimes.joined import join
from perceiver_export.runtimes.loading import load
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.runtime import Runtime
from perceiver_export.runtimes.tasks.base import Task

# The module beside this one and its class; imported when a bundle of that task is opened.
TASKS = {
    "image-classification": ("image_classification", "ImageClassification"),
    "fill-mask": ("fill_mask", "FillMask"),
    "text-classification": ("text_classification", "TextClassification"),
    "optical-flow": ("optical_flow", "OpticalFlow"),
    "video-autoencoding": ("video_autoencoding", "VideoAutoencoding"),
    "audio-classification": ("audio_classification", "AudioClassification"),
    "point-cloud-classification": ("point_cloud_classification", "PointCloudClassification"),
    "sets": ("arrays", "Sets"),
    "arrays": ("arrays", "Arrays"),
}


def open_task(
    bundle: str | os.PathLike[str] | Bundle,
    device: str = "auto",
    threads: int | None = None,
    verify: Verify = "auto",
    check_finite: bool = False,
    precision: Precision | None = None,
) -> Any:
    """Load a bundle with the pre- and post-processing of its task: one of the classes of `TASKS`, by the manifest.

    Its graphs are loaded when they are first needed. Arguments are those of `load`. Raises what `load` raises.
    """
    opened = open_bundle(bundle, verify)
    task = checked_task(opened.manifest)

    def load_part(name: str | None) -> Runtime:
        if name is None and opened.split:  # the weights of its parts are in memory once, however they are used
            return join(opened.manifest, {part: made.part(part) for part in opened.manifest.parts})
        return load(opened, device, name, threads, "never", precision=precision, check_finite=check_finite)

    made = task(opened.manifest, load_part)
    return made


def checked_task(manifest: Manifest) -> type[Task]:
    """The class of the manifest's task. Raises BundleError: an unknown task, or a manifest that does not fit it."""
    if manifest.task not in TASKS:
        raise BundleError(
            f"{manifest.name} is of the unknown task {manifest.task!r}", f"this version knows: {', '.join(TASKS)}"
        )
    module, name = TASKS[manifest.task]
    task: type[Task] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    task.check(manifest)
    return task
