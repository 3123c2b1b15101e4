# SPDX-License-Identifier: Apache-2.0
"""DATA as a bundle's inputs: a stream of ``{name: array}``, one sample at a time, whatever the task.

| DATA | for | what it holds |
|---|---|---|
| pictures, or an .npz with `image` | image classification | what `data.open_data` reads; prepared as the bundle says |
| .jsonl | texts | a line each: ``{"text": "…"[, "label": …]}`` |
| .npz, or a directory of them | all | arrays by input name, samples on the first axis; and what `validate` judges by |
| module:function, or an iterable | all | ``{name: array}`` of one sample, with or without an axis of 1 in front |
| ``random`` | sizing a device | random numbers; the bundle says so for ever |

A mask of an input, ``NAME_mask``, may be left out of arrays: then nothing is masked.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from perceiver_export.calibration.data import Sample, converted, is_of_kind, open_data, read_archives
from perceiver_export.calibration.frames import with_frames
from perceiver_export.calibration.labels import label_index
from perceiver_export.calibration.masks import is_mask, require_masks, with_masks
from perceiver_export.calibration.user_code import call_function, samples_of
from perceiver_export.runtimes.byte_tokenizer import ByteTokenizer
from perceiver_export.runtimes.errors import DataError, InputError
from perceiver_export.runtimes.manifest import Manifest, TensorSpec
from perceiver_export.runtimes.pictures import read_picture, to_input
from perceiver_export.runtimes.preprocessing import ImagePreprocessing, TextPreprocessing
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks.arrays import check_tokens, vocabulary_sizes

RANDOM = "random"
ITERABLE = "an iterable"  # what data is called that has no name
Data = str | Path | Iterable[Mapping[str, Array]]

_LABELS = ("label", "labels")
_SPECIAL, _BYTES = 6, 262  # tokens of the papers: the first are no bytes
_NOT_DATA = ("latents", "queries")  # what a decoder takes from the encoder and from its caller


@dataclass(frozen=True)
class Example:
    """One sample without the batch axis, each input by name; its label's index where there is one."""

    feeds: dict[str, Array]
    label: int | None
    name: str


@dataclass(frozen=True)
class Examples:
    """A stream that can be gone through once, and how many there are where that is known."""

    stream: Iterator[Example]
    count: int | None


def open_feeds(data: Data, manifest: Manifest, samples: int | None = None) -> Examples:
    """Open DATA for a bundle. Raises DataError here or while reading: what is wrong, and in which sample.

    Of more than ``samples`` that many are taken, evenly spread where their number is known: data is often sorted.
    """
    specs = model_inputs(manifest)
    if isinstance(data, (str, Path)):
        opened = _open(data, manifest, specs, samples)
    else:
        count = len(data) if isinstance(data, Sized) else None
        items = samples_of(_spread(data, count, samples), "the data")
        opened = Examples(_from_dicts(items, "the data", manifest), count)
    count = opened.count if samples is None or opened.count is None else min(samples, opened.count)
    return Examples(_checked(itertools.islice(opened.stream, samples), manifest), count)


def model_inputs(manifest: Manifest) -> tuple[TensorSpec, ...]:
    """What the whole model takes: the inputs of all parts, each once, without latents and query indices."""
    specs = {spec.name: spec for part in manifest.parts.values() for spec in part.inputs}
    return tuple(spec for name, spec in specs.items() if name not in _NOT_DATA)


_T = TypeVar("_T")


def _spread(items: Iterable[_T], count: int | None, samples: int | None) -> Iterator[_T]:
    """``samples`` of ``count`` items, evenly spread; all of them where their number is not known."""
    if count is None or samples is None or count <= samples:
        yield from items
        return
    wanted = {index * count // samples for index in range(samples)}
    for index, item in enumerate(items):
        if index in wanted:
            yield item


def _open(data: str | Path, manifest: Manifest, specs: tuple[TensorSpec, ...], samples: int | None) -> Examples:
    path, text = Path(data), str(data)
    if text == RANDOM:
        return Examples(_random(manifest, specs), None)
    if ":" in text and not path.exists():
        return Examples(_from_dicts(call_function(text), text, manifest), None)
    if isinstance(manifest.preprocessing, ImagePreprocessing):
        opened = open_data(data, manifest.labels)
        chosen = _spread(opened.samples, opened.count, samples)
        return Examples(_pictures(chosen, specs[0].name, manifest.preprocessing), opened.count)
    if path.suffix == ".jsonl":
        return _from_jsonl(path, manifest, samples)
    archives = (
        sorted(path.glob("*.npz")) if path.is_dir() else [path] if path.suffix == ".npz" and path.exists() else []
    )
    if archives:
        return _from_archives(archives, manifest, samples)
    raise DataError(
        f"{text} is not data for {manifest.task}" if path.exists() else f"{text} does not exist",
        f"give an .npz of {', '.join(spec.name for spec in specs)} (samples first), .jsonl of text, or module:function",
    )


def _pictures(samples: Iterable[Sample], name: str, steps: ImagePreprocessing) -> Iterator[Example]:
    for sample in samples:
        yield Example({name: _prepared(sample.image, steps, sample.name)}, sample.label, sample.name)


def _prepared(image: Path | Array, steps: ImagePreprocessing, where: str) -> Array:
    """A picture as the model takes it; an array of floats is that already."""
    try:
        if isinstance(image, Path):
            return to_input(read_picture(image), steps)
        return to_input(image, steps) if image.dtype == np.uint8 else image
    except InputError as error:
        raise DataError(f"{where}: {error.message}", error.hint) from error


def _from_jsonl(path: Path, manifest: Manifest, samples: int | None) -> Examples:
    if not isinstance(manifest.preprocessing, TextPreprocessing):
        raise DataError(f"{path} holds text, the bundle is of {manifest.task}", "give an .npz or module:function")
    try:
        # Not `splitlines`: in JSON a line may hold U+2028 and its like.
        lines = [one for one in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1) if one[1].strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "give UTF-8, one JSON object a line") from error
    return Examples(_texts(_spread(lines, len(lines), samples), path, manifest), len(lines))


def _texts(lines: Iterable[tuple[int, str]], path: Path, manifest: Manifest) -> Iterator[Example]:
    tokenizer = ByteTokenizer.from_manifest(manifest)
    for number, line in lines:
        where = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
            text, label = row["text"], row.get("label")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where} is not an object with a `text`", 'a line is {"text": "…", "label": …}') from error
        if not isinstance(text, str):
            raise DataError(f"{where}: `text` is of type {type(text).__name__}", "give a string")
        try:
            feeds = {name: array[0] for name, array in tokenizer([text]).items()}
        except InputError as error:
            raise DataError(f"{where}: {error.message}", error.hint) from error
        yield Example(feeds, _label(label, manifest, where), where)


def _from_archives(paths: list[Path], manifest: Manifest, samples: int | None) -> Examples:
    names = [spec.name for spec in model_inputs(manifest)]
    counts = []
    for path, arrays in read_archives(paths):
        missing = [name for name in names if name not in arrays and not is_mask(name)]
        if missing:
            raise DataError(
                f"{path} has no {missing[0]!r}, it holds {', '.join(sorted(arrays)) or 'nothing'}",
                f"the model takes {', '.join(names)}; samples are on the first axis",
            )
        unknown = sorted(name for name in set(arrays) - set(names) if not _is_target(name, manifest))
        if unknown:
            raise DataError(
                f"{path} holds {unknown[0]!r}, which the model does not take", f"it takes {', '.join(names)}"
            )
        sizes = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        if len(set(sizes.values())) != 1:
            raise DataError(f"{path}: {sizes} samples", "every array has one row a sample")
        counts.append(next(iter(sizes.values())))
    return Examples(_spread(_rows(paths, manifest), sum(counts), samples), sum(counts))


def _is_target(name: str, manifest: Manifest) -> bool:
    """Whether an array is not for the model, but for `validate`, which reads the same files."""
    known = (*_LABELS, "flow") if manifest.task == "optical-flow" else _LABELS
    return name in known or manifest.task in ("sets", "arrays")  # metrics of one's own take any array


def _rows(paths: list[Path], manifest: Manifest) -> Iterator[Example]:
    for path, arrays in read_archives(paths):
        labels = next((arrays[name] for name in _LABELS if name in arrays), None)
        inputs = {name: array for name, array in arrays.items() if name not in _LABELS}
        for index in range(len(next(iter(inputs.values())))):
            where = f"{path.name}[{index}]"
            label = None if labels is None else _label(labels[index], manifest, where)
            yield Example({name: array[index] for name, array in inputs.items()}, label, where)


def _from_dicts(items: Iterable[Any], where: str, manifest: Manifest) -> Iterator[Example]:
    steps = manifest.preprocessing
    for index, item in enumerate(items):
        name = f"{where}[{index}]"
        if not isinstance(item, Mapping) or not all(
            isinstance(array, np.ndarray) for key, array in item.items() if key not in _LABELS
        ):
            raise DataError(f"{name} is not a dict of numpy arrays", "yield {name: array}")
        feeds = {key: array for key, array in item.items() if key not in _LABELS}
        label = next((item[key] for key in _LABELS if key in item), None)
        if isinstance(steps, ImagePreprocessing) and "image" in feeds:
            feeds["image"] = _prepared(feeds["image"], steps, name)
        yield Example(feeds, _label(label, manifest, name), name)


def _random(manifest: Manifest, specs: tuple[TensorSpec, ...]) -> Iterator[Example]:
    """Normal numbers; random tokens that the model knows. Masks are left out: nothing is masked."""
    generator, index = np.random.default_rng(0), 0
    known = vocabulary_sizes(manifest)
    while True:
        feeds = {}
        for spec in specs:
            shape = _sample_shape(spec)
            if spec.dtype == "float32":
                feeds[spec.name] = generator.normal(size=shape).astype(np.float32)
            elif not is_mask(spec.name):
                count = known.get(spec.name, _BYTES)
                first = _SPECIAL if count > _SPECIAL else 0
                feeds[spec.name] = generator.integers(first, count, shape).astype(spec.dtype)
        yield Example(feeds, None, f"random[{index}]")
        index += 1


def _checked(examples: Iterable[Example], manifest: Manifest) -> Iterator[Example]:
    """The same, each with the names, dtypes and shapes that the model takes and without NaN."""
    specs = model_inputs(manifest)
    names = {spec.name for spec in specs}
    for example in examples:
        feeds = {}
        given = with_masks(with_frames(example.feeds, manifest), specs, example.name)
        unknown = sorted(name for name in set(given) - names if not _is_target(name, manifest))
        if unknown:
            raise DataError(
                f"{example.name} has {unknown[0]!r}, which the model does not take",
                f"it takes {', '.join(spec.name for spec in specs)}",
            )
        for spec in specs:
            array = given.get(spec.name)
            if array is None:
                raise DataError(
                    f"{example.name} has no {spec.name!r}", f"it has {', '.join(example.feeds) or 'nothing'}"
                )
            feeds[spec.name] = _fitted(array, spec, example.name)
        try:
            check_tokens(feeds, manifest)
        except InputError as error:
            raise DataError(f"{example.name}: {error.message}", error.hint) from error
        require_masks(feeds, specs, example.name)
        yield Example(feeds, example.label, example.name)


def _fitted(array: Array, spec: TensorSpec, where: str) -> Array:
    shape = _sample_shape(spec)
    if array.shape == (1, *shape):
        array = array[0]
    kind = np.dtype(spec.dtype)
    if array.shape != shape or not is_of_kind(array.dtype, kind):
        raise DataError(
            f"{spec.name!r} of {where} is {array.dtype} {list(array.shape)}, the model takes {kind} {list(shape)}",
            "give arrays as the model takes them; shapes are without the batch",
        )
    return converted(array, kind, f"{spec.name!r} of {where}")


def _sample_shape(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else spec.ranges.get(dim, (1, 1))[1] for dim in spec.shape[1:])


def _label(label: Any, manifest: Manifest, where: str) -> int | None:
    """A label's number; None where there is none, or the model has no labels."""
    return None if label is None or not manifest.labels else label_index(label, manifest.labels, where)
