# SPDX-License-Identifier: Apache-2.0
"""DATA as what a model is judged on: its inputs, and the targets that its outputs are held against.

| task | inputs | targets |
|---|---|---|
| image classification | as `calibration.data` | labels |
| other classifiers | arrays by the inputs' names; of text also .jsonl with ``text`` | ``labels``, ``label`` |
| masked language model | .jsonl with ``text``, or ``tokens`` | 15 % of the bytes, masked here |
| optical flow | ``frames``, as the model takes them or uint8 (N, 2, H, W, 3) | ``flow`` (N, H, W, 2), NaN: unknown |
| video autoencoding | arrays by the inputs' names | the inputs themselves |
| sets, arrays | arrays by the inputs' names | any other array, for a metric of one's own |

Arrays come in an .npz, a directory of them, or from module:function as dicts without the batch, or with an axis of 1 in
front; a mask of an input, ``NAME_mask``, may be left out. Each example is held against what the model takes before it
runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.calibration.data import Sample, converted, is_of_kind, open_data
from perceiver_export.calibration.frames import with_frames
from perceiver_export.calibration.labels import label_index
from perceiver_export.calibration.masking import mask_tokens
from perceiver_export.calibration.masks import require_masks, with_masks
from perceiver_export.calibration.user_code import call_function
from perceiver_export.runtimes.byte_tokenizer import ByteTokenizer
from perceiver_export.runtimes.errors import DataError, InputError
from perceiver_export.runtimes.manifest import Manifest, TensorSpec
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks.arrays import read_arrays
from perceiver_export.runtimes.tasks.base import Task
from perceiver_export.runtimes.tasks.graphs import interface
from perceiver_export.runtimes.tasks.image_classification import ImageClassification

Arrays = dict[str, Array]

_TEXT_TASKS = ("fill-mask", "text-classification")


@dataclass(frozen=True)
class Example:
    """One sample, without the batch. ``source`` is what a person would look at: a picture's path or pixels, a text.

    ``digest`` is of the inputs as they were given to the model at calibration: equal for equal content, whatever file
    it came from, and before anything is masked.
    """

    name: str
    feeds: Arrays
    targets: Arrays
    source: Path | Array | str | None = None
    digest: str = ""


@dataclass(frozen=True)
class Examples:
    """Examples that can be gone through once, and how many there are where that is known."""

    stream: Iterable[Example]
    count: int | None


def open_examples(task: Task, spec: str | Path) -> Examples:
    """Open DATA for a bundle's task. Raises DataError; going through it may raise it later too."""
    if isinstance(task, ImageClassification):
        data = open_data(spec, task.labels)
        return Examples((_picture(task, sample) for sample in data.samples), data.count)
    manifest, path, text = task.manifest, Path(spec), str(spec)
    specs = interface(manifest)[0]
    make = _maker(manifest, {spec.name: spec for spec in specs})
    if path.suffix == ".jsonl" and path.is_file():
        rows = _lines(path, manifest)
        return Examples(map(make, rows), len(rows))
    if path.exists():
        files = sorted(path.glob("*.npz")) if path.is_dir() else [path] if path.suffix == ".npz" else []
        if not files:
            raise DataError(f"{text} holds nothing for {manifest.task}", "give an .npz, or a directory of them")
        counts = [_count(file, _read(file)) for file in files]
        return Examples(map(make, _rows(files)), sum(counts))
    if ":" in text:
        return Examples(map(make, _from_function(text)), None)
    raise DataError(f"{text} does not exist", "give an .npz, a directory of them, .jsonl, or module:function")


def digest_of(feeds: Mapping[str, Array]) -> str:
    """16 characters of the SHA-256 of a sample's inputs, without the batch."""
    digest = hashlib.sha256()
    for name, array in sorted(feeds.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


_Row = tuple[str, Mapping[str, Any]]


def _maker(manifest: Manifest, specs: Mapping[str, TensorSpec]) -> Callable[[_Row], Example]:
    """Rows of DATA -> examples of this task."""
    tokenizer = ByteTokenizer.from_manifest(manifest) if manifest.task in _TEXT_TASKS else None

    def make(row: _Row) -> Example:
        name, values = row
        values, source = dict(values), values.get("text")
        if tokenizer is not None and "text" in values:
            try:
                encoded = tokenizer([values.pop("text")])
            except InputError as error:
                raise DataError(f"{name}: {error.message}", error.hint) from error
            values |= {key: array[0] for key, array in encoded.items()}
        values = with_masks(with_frames(values, manifest), specs.values(), name)
        feeds = {key: _checked(name, values.pop(key, None), spec) for key, spec in specs.items()}
        require_masks(feeds, specs.values(), name)
        digest = digest_of(feeds)
        targets = _targets(manifest, name, feeds, values)
        return Example(name, feeds, targets, source, digest)

    return make


def _targets(manifest: Manifest, name: str, feeds: Arrays, values: dict[str, Any]) -> Arrays:
    if manifest.task == "fill-mask":
        feeds["tokens"], hidden = mask_tokens(feeds["tokens"], feeds["tokens_mask"])
        return {"tokens": hidden}
    if manifest.task == "video-autoencoding":
        return dict(feeds)
    label = values.pop("label", values.pop("labels", None))
    targets = {key: np.asarray(value) for key, value in values.items()}
    if label is not None:
        count = len(manifest.labels) or int(interface(manifest)[1][0].shape[-1])
        targets["label"] = np.asarray(label_index(label, manifest.labels, name, count))
    if manifest.task == "optical-flow" and "flow" in targets:
        expected = (*feeds["frames"].shape[-2:], 2)
        if targets["flow"].shape != expected or targets["flow"].dtype.kind != "f":
            found = targets["flow"]
            raise DataError(f"{name}: `flow` is {found.dtype} {list(found.shape)}", f"give float {list(expected)}")
    return targets


def _picture(task: ImageClassification, sample: Sample) -> Example:
    image, spec = sample.image, task.runtime.inputs[0]
    try:
        prepared = image if isinstance(image, np.ndarray) and image.dtype != np.uint8 else task.preprocess(image)
    except InputError as error:
        raise DataError(f"{sample.name}: {error.message}", error.hint) from error
    targets = {} if sample.label is None else {"label": np.asarray(sample.label)}
    feeds = {spec.name: _checked(sample.name, prepared, spec)}
    return Example(sample.name, feeds, targets, image, digest_of(feeds))


def _checked(name: str, given: Any, spec: TensorSpec) -> Array:
    """The array, if the model takes it."""
    shape, dtype = spec.shape[1:], np.dtype(spec.dtype)
    if not isinstance(given, np.ndarray):
        found = "missing" if given is None else f"of type {type(given).__name__}"
        raise DataError(f"{name}: {spec.name!r} is {found}", f"give {dtype} {list(shape)}")
    array: Array = given[0] if given.ndim == len(shape) + 1 and len(given) == 1 else given
    fits = len(array.shape) == len(shape) and all(
        isinstance(size, str) or size == found for size, found in zip(shape, array.shape, strict=True)
    )
    if not is_of_kind(array.dtype, dtype) or not fits:
        raise DataError(
            f"{name}: {spec.name!r} is {array.dtype} with shape {list(array.shape)}",
            f"give {dtype} {list(shape)}, as the model takes it",
        )
    return converted(array, dtype, f"{name}: {spec.name!r}")


def _lines(path: Path, manifest: Manifest) -> list[_Row]:
    if manifest.task not in _TEXT_TASKS:
        raise DataError(f"{path} holds text, the bundle is of {manifest.task}", "give arrays as .npz")
    rows: list[_Row] = []
    try:
        # Not `splitlines`: in JSON a line may hold U+2028 and its like.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise DataError(f"{path}, line {number} has no `text`", '{"text": "…"} on each line')
                rows.append((f"{path.name}:{number}", row))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", '{"text": "…"} on each line, in UTF-8') from error
    return rows


def _rows(files: Iterable[Path]) -> Iterator[_Row]:
    for file in files:
        arrays = _read(file)
        for index in range(_count(file, arrays)):
            yield f"{file.name}[{index}]", {name: array[index] for name, array in arrays.items()}


def _read(file: Path) -> Arrays:
    try:
        arrays = read_arrays(file)
    except InputError as error:
        raise DataError(error.message, error.hint) from error
    assert isinstance(arrays, dict)  # an .npz
    return arrays


def _count(file: Path, arrays: Arrays) -> int:
    counts = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(counts) != 1 or 0 in counts:
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise DataError(f"{file} holds {found or 'nothing'}", "all arrays have the samples as their first axis")
    return counts.pop()


def _from_function(spec: str) -> Iterator[_Row]:
    for index, row in enumerate(call_function(spec)):
        if not isinstance(row, Mapping):
            raise DataError(f"{spec} gave a {type(row).__name__}", "it yields dicts of numpy arrays")
        yield f"{spec.partition(':')[2]}[{index}]", row
