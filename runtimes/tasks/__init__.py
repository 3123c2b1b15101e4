# SPDX-License-Identifier: Apache-2.0
"""Tasks: what comes before and after a bundle's graph, in numpy. `open_task` picks by the manifest."""

from __future__ import annotations

import os

from perceiver_export.runtimes.bundle import Bundle, Verify, open_bundle
from perceiver_export.runtimes.errors import BundleError
from perceiver_export.runtimes.runtime import load
from perceiver_export.runtimes.tasks.image_classification import ImageClassification

TASKS = {"image-classification": ImageClassification}


def open_task(
    bundle: str | os.PathLike[str] | Bundle, device: str = "auto", threads: int | None = None, verify: Verify = "auto"
) -> ImageClassification:
    """Load a bundle with the pre- and post-processing of its task. Raises what `load` raises."""
    opened = open_bundle(bundle, verify)
    task = TASKS.get(opened.manifest.task)
    if task is None:
        raise BundleError(
            f"{opened.path} is of the unknown task {opened.manifest.task!r}", f"this version knows: {', '.join(TASKS)}"
        )
    task.check(opened.manifest)
    return task(opened.manifest, load(opened, device, threads=threads, verify="never"))
