# SPDX-License-Identifier: Apache-2.0
"""Code that tasks share: a bundle's parts, opened once and closed together; checks of a manifest; runs on any number of
samples; and predictions, which are labels with probabilities, or values.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import BundleError, InputError, RuntimeClosedError, check_whole
from perceiver_export.runtimes.manifest import Manifest, OutputKind, judged_output
from perceiver_export.runtimes.manifest import interface as interface
from perceiver_export.runtimes.manifest import misfit as misfit
from perceiver_export.runtimes.runtime import Array, Feeds, Runtime, count_samples, pad_batch
from perceiver_export.runtimes.tasks.tokenizers import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self


# Loads a part by name. None is the whole model, for which a split bundle's parts are joined.
LoadPart = Callable[[str | None], Runtime]


class Task:
    """A bundle with the pre- and post-processing of its task. Use it as a context manager, or call `close`."""

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        self.manifest = manifest
        self._load_part = load_part
        self._parts: dict[str | None, Runtime] = {}
        self._process = os.getpid()
        self._closed, self._lock = False, threading.RLock()  # a whole model loads its parts

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes this task."""

    @property
    def split(self) -> bool:
        """Whether encoder and decoder are separate parts of the bundle."""
        return "encoder" in self.manifest.parts

    @property
    def runtime(self) -> Runtime:
        """The whole model; for a split bundle, its parts joined."""
        return self.part(None)

    def part(self, name: str | None) -> Runtime:
        """One part of the bundle, loaded on first use; None is the whole model. Raises what `load` raises."""
        if os.getpid() != self._process:  # in a child the lock may be held forever
            raise RuntimeClosedError("this task belongs to the parent process", "call open_task() in the child")
        with self._lock:
            if self._closed:
                raise RuntimeClosedError("this task is closed", "call open_task() again")
            if name not in self._parts:
                self._parts[name] = self._load_part(name)
            return self._parts[name]

    def close(self) -> None:
        """Close every part that was loaded. May be called twice; does nothing in a forked child."""
        if os.getpid() != self._process:
            return
        with self._lock:  # no part is loaded later
            self._closed = True
        for runtime in reversed(self._parts.values()):  # the whole model before its parts
            runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Classifier(Task):
    """A task whose model has one output (n, labels) of scores or values."""

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        self._output, self.kind = answering(manifest)
        self.labels = manifest.labels

    def run_inputs(self, feeds: Feeds) -> npt.NDArray[np.float32]:
        """Logits or values (n, labels) of n preprocessed samples. Raises InputError: no samples."""
        return run_batched(self.runtime, feeds)[self._output]

    def answers(self, scores: npt.NDArray[np.float32], top: int) -> list[Prediction]:
        """See `answer`."""
        return answer(scores, self.kind, self.labels, top)


class TextTask(Task):
    """A task that reads text, with the tokenizer of its bundle."""

    def __init__(self, manifest: Manifest, load_part: LoadPart, tokenizer: Tokenizer) -> None:
        super().__init__(manifest, load_part)
        self.tokenizer = tokenizer


# A shape without the batch dimension; None is any size.
Shape = tuple[int | None, ...]
Steps = TypeVar("Steps")


def steps_of(manifest: Manifest, kind: type[Steps]) -> Steps:
    """The manifest's preprocessing. Raises BundleError: it is of another kind or missing."""
    if not isinstance(manifest.preprocessing, kind):
        raise misfit(f"the manifest has no preprocessing for {manifest.task}")
    return manifest.preprocessing


def check_interface(manifest: Manifest, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> None:
    """Raise BundleError unless the model has these inputs and outputs; shapes exclude the batch dimension."""
    for specs, expected, noun in zip(interface(manifest), (inputs, outputs), ("inputs", "outputs"), strict=True):
        found = {spec.name: spec.shape[1:] for spec in specs}
        if found.keys() != expected.keys() or not all(_fits(found[name], expected[name]) for name in found):
            raise misfit(f"the {noun} of {manifest.task} are {_listed(expected)}, but the model has {_listed(found)}")


def answering(manifest: Manifest) -> tuple[str, OutputKind]:
    """The output (labels,) that holds the predictions, and its kind.

    Raises BundleError: no such output, or its size is not the number of labels. A manifest without labels is accepted.
    """
    found = judged_output(manifest)
    if found is None:
        kinds = ", ".join(f"{name}: {kind}" for name, kind in manifest.output_kinds.items())
        said = f"{manifest.task} needs one output of labels or values, but the manifest has {kinds or 'none'}"
        raise BundleError(said, "name its kind when you export: LoadedModel(…, output_kinds={NAME: 'single-label'})")
    spec = next((spec for spec in interface(manifest)[1] if spec.name == found[0]), None)
    if spec is None or len(spec.shape) != 2:
        raise misfit(f"the output {found[0]!r} is not a list of scores")
    if manifest.labels and spec.shape[-1] != len(manifest.labels):
        raise misfit(f"the manifest has {len(manifest.labels)} labels for {spec.shape[-1]} scores")
    return found


def as_list(given: Any, what: str, is_one: Callable[[Any], bool]) -> list[Any]:
    """The samples as a list; if ``is_one(given)``, a list of that one. Raises InputError: no samples."""
    if is_one(given):
        return [given]
    if not isinstance(given, Iterable):
        raise InputError(f"the {what} are of type {type(given).__name__}", f"give a list of {what}")
    samples = list(given)
    if not samples:
        raise InputError(f"the list of {what} is empty", "give one or more")
    return samples


def run_batched(runtime: Runtime, feeds: Feeds) -> dict[str, Array]:
    """Outputs of n samples by name, run in batches of the size that the graph was exported for.

    Each feed is (n, ...). A short last batch is padded with copies of its last sample, whose outputs are dropped.

    Raises InputError: no samples, or feeds of different n; and what `Runtime.run` raises.
    """
    count, most = count_samples(feeds), runtime.inputs[0].limits(0)[1]
    results = [
        runtime.run(pad_batch(runtime, {name: array[start : start + most] for name, array in feeds.items()}))
        for start in range(0, count, most)
    ]
    if len(results) == 1:
        return {name: array[:count] for name, array in results[0].items()}
    return {name: np.concatenate([result[name] for result in results])[:count] for name in results[0]}


def _fits(shape: tuple[int | str, ...], expected: Shape) -> bool:
    return len(shape) == len(expected) and all(most in (None, size) for size, most in zip(shape, expected, strict=True))


def _listed(shapes: Mapping[str, Sequence[int | str | None]]) -> str:
    sizes = {name: " × ".join("any" if size is None else str(size) for size in shape) for name, shape in shapes.items()}
    return ", ".join(f"{name} ({listed})" for name, listed in sizes.items())


@dataclass(frozen=True)
class Prediction:
    """A label, its index and its probability: softmax of the logits, or sigmoid if several labels may apply at once."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Value(Prediction):
    """An unchanged output value of a regression model; ``label`` names it. Its probability is NaN."""

    value: float


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Probabilities along the last axis."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


def answer(scores: npt.NDArray[np.float32], kind: OutputKind, labels: Sequence[str], top: int) -> list[Prediction]:
    """The predictions in one sample's output (labels,), by the kind of output in the manifest.

    Single-label: the ``top`` labels by softmax. Multi-label: the ``top`` labels, each with the sigmoid of its own
    logit. Regression: all values in the output's order. Without label names the index is the label. Raises UsageError:
    ``top`` below 1.
    """
    check_top(top)
    names = labels or [str(index) for index in range(len(scores))]
    if kind == "regression":
        return [Value(names[i], i, math.nan, value) for i, value in enumerate(scores.tolist())]
    probabilities = sigmoid(scores) if kind == "multi-label" else softmax(scores)
    best = np.argsort(-probabilities, kind="stable")[:top]
    return [Prediction(names[i], int(i), float(probabilities[i])) for i in best]


def check_top(top: int) -> None:
    """Raise UsageError if ``top`` is below 1. Call it before a long run."""
    check_whole("top", top, 1, None, "ask for 1 or more labels")


def sigmoid(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Probabilities of labels if several may apply at once."""
    # The exponent is never above 0, so nothing overflows.
    exponents = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1, exponents) / (1 + exponents), dtype=np.float32)
