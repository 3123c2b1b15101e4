# SPDX-License-Identifier: Apache-2.0
"""Tasks: pre- and post-processing around a bundle's graphs, in numpy. `open_task` chooses the task by the manifest.

from perceiver_export.runtimes.tasks import ImageClassification, open_task

with open_task("fashion", ImageClassification) as classify:
    predictions = classify("bag.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeVar, overload

from perceiver_export.runtimes.bundle import BundleLike, Verify, open_bundle
from perceiver_export.runtimes.engines.backend import PrecisionChoice
from perceiver_export.runtimes.errors import BundleError, UsageError
from perceiver_export.runtimes.loading import load
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.runtime import Runtime
from perceiver_export.runtimes.split import join
from perceiver_export.runtimes.tasks.base import Task as Task
from perceiver_export.runtimes.tasks.base import TextTask
from perceiver_export.runtimes.tasks.tokenizers import open_tokenizer, truncating

if TYPE_CHECKING:
    from perceiver_export.runtimes.tasks.arrays import Arrays as Arrays
    from perceiver_export.runtimes.tasks.arrays import Sets as Sets
    from perceiver_export.runtimes.tasks.flow import OpticalFlow as OpticalFlow
    from perceiver_export.runtimes.tasks.images import ImageClassification as ImageClassification
    from perceiver_export.runtimes.tasks.points import PointCloudClassification as PointCloudClassification
    from perceiver_export.runtimes.tasks.sound import AudioClassification as AudioClassification
    from perceiver_export.runtimes.tasks.text import FillMask as FillMask
    from perceiver_export.runtimes.tasks.text import TextClassification as TextClassification
    from perceiver_export.runtimes.tasks.video import VideoAutoencoding as VideoAutoencoding

    class AnyTask(Task):
        """A task whose class is known only from the manifest: members of `Task` are typed, the rest is Any."""

        def __call__(self, *arguments: Any, **options: Any) -> Any: ...
        def __getattr__(self, name: str) -> Any: ...


T = TypeVar("T", bound=Task)

# The module in this package and its class; imported when a bundle of that task is opened.
TASKS = {
    "image-classification": ("images", "ImageClassification"),
    "fill-mask": ("text", "FillMask"),
    "text-classification": ("text", "TextClassification"),
    "optical-flow": ("flow", "OpticalFlow"),
    "video-autoencoding": ("video", "VideoAutoencoding"),
    "audio-classification": ("sound", "AudioClassification"),
    "point-cloud-classification": ("points", "PointCloudClassification"),
    "sets": ("arrays", "Sets"),
    "arrays": ("arrays", "Arrays"),
}
__all__ = ["TASKS", "Task", "checked_task", "open_task", *(task for _, task in TASKS.values())]


def __getattr__(name: str) -> Any:
    module = next((module for module, task in TASKS.values() if task == name), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


@overload
def open_task(
    bundle: BundleLike,
    expect: type[T],
    device: str = "auto",
    threads: int | None = None,
    verify: Verify = "auto",
    check_finite: bool = False,
    precision: PrecisionChoice | None = None,
    truncate: bool = False,
) -> T: ...


@overload
def open_task(
    bundle: BundleLike,
    device: str = "auto",
    threads: int | None = None,
    verify: Verify = "auto",
    check_finite: bool = False,
    precision: PrecisionChoice | None = None,
    truncate: bool = False,
) -> AnyTask: ...


def open_task(bundle: BundleLike, *arguments: Any, expect: type[Task] = Task, **options: Any) -> Any:
    """Load a bundle with the pre- and post-processing of its task: one of the classes of `TASKS`, by the manifest.

    ``expect`` is the class that the task must have; it also gives type checkers and editors the class of the result.
    Without it they know only the members of `Task`. Graphs are loaded when first needed. ``truncate`` cuts texts that
    are too long for the model, even if the checkpoint's tokenizer does not. `load` describes the other options.

    Raises what `load` raises; UsageError: the bundle has another task than expected, or ``truncate`` is set and it
    takes no text; MissingDependencyError: the tokenizer's library.
    """
    if arguments and isinstance(arguments[0], type):
        expect, *arguments = arguments  # type: ignore[assignment]
    return _open(bundle, expect, *arguments, **options)


def _open(
    bundle: BundleLike,
    expect: type[Task],
    device: str = "auto",
    threads: int | None = None,
    verify: Verify = "auto",
    check_finite: bool = False,
    precision: PrecisionChoice | None = None,
    truncate: bool = False,
) -> Task:
    opened = open_bundle(bundle, verify)
    reading = truncating(opened) if truncate else opened
    task = checked_task(opened.manifest)
    if not issubclass(task, expect):
        found = f"the task of {opened.path} is {opened.manifest.task}, not {expect.__name__}"
        raise UsageError(found, f"open it as {task.__name__}, or give another bundle")

    def load_part(name: str | None) -> Runtime:
        if name is None and opened.split:  # joined parts share their weights with the parts used alone
            return join(opened, {part: made.part(part) for part in opened.manifest.parts})
        return load(opened, device, name, threads, "never", precision=precision, check_finite=check_finite)

    tokenizer = (open_tokenizer(reading.manifest, reading.path),) if issubclass(task, TextTask) else ()
    made: Task = task(opened.manifest, load_part, *tokenizer)
    return made


def checked_task(manifest: Manifest) -> type[Task]:
    """The class of the manifest's task. Raises BundleError: an unknown task, or a manifest that does not match it."""
    if manifest.task not in TASKS:
        raise BundleError(f"{manifest.name} has the unknown task {manifest.task!r}", f"use one of {', '.join(TASKS)}")
    module, name = TASKS[manifest.task]
    task: type[Task] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    task.check(manifest)
    return task
