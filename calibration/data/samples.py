# SPDX-License-Identifier: Apache-2.0
"""The reader of DATA: it turns raw samples into a model's inputs and the targets of its outputs.

`quantize` uses the inputs, `validate` both. Each sample is checked against the model's inputs before it runs.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from perceiver_export.calibration.data.sources import (
    LABELS,
    RANDOM,
    Data,
    Labels,
    Row,
    Source,
    is_mask,
    largest,
    open_source,
)
from perceiver_export.runtimes.errors import DataError, InputError, LongTextError
from perceiver_export.runtimes.files import reading
from perceiver_export.runtimes.manifest import Manifest, TensorSpec
from perceiver_export.runtimes.preprocessing import FlowPreprocessing, ImagePreprocessing, TextPreprocessing
from perceiver_export.runtimes.runtime import Array, check_values
from perceiver_export.runtimes.tasks.arrays import check_masks
from perceiver_export.runtimes.tasks.base import interface
from perceiver_export.runtimes.tasks.image_files import take_image, to_input
from perceiver_export.runtimes.tasks.tokenizers import Tokenizer, open_tokenizer

Arrays = dict[str, Array]

_T = TypeVar("_T")
_SHARE = 0.15  # the share of a text's tokens to mask, as in training (Devlin et al. 2019; Perceiver IO, section 4.1)
_BLOCK, _BLOCK_BYTES = 2_048, 256 << 20  # samples of a random order that are in memory at once, and their size


@dataclass(frozen=True)
class Example:
    """One sample, without the batch. ``source`` is its readable form: an image's path or pixels, or a text.

    ``labels`` has the names in its label. ``digest`` is the digest of the inputs before masking, so equal content has
    equal digests in any file. ``position`` is its place in the data, from 0.
    """

    name: str
    feeds: Arrays
    targets: Arrays
    source: Path | Array | str | None = None
    labels: tuple[str, ...] = ()
    digest: str = ""
    position: int = 0


class Notes(msgspec.Struct):
    """Assumptions about labels, and texts that were skipped or cut, by position.

    ``count`` is the number of samples in the data, if known. ``unlisted``: see `Source`.
    """

    count: int | None
    labels: dict[str, str] = {}
    left_out: dict[int, str] = {}
    cut: dict[int, str] = {}
    unlisted: str = ""

    def by_kind(self) -> dict[str, str]:
        """One note for each kind: labels, unlisted, left out, cut."""
        whole = "" if self.count is None else f" of {self.count:,}"
        found = {"labels": "; ".join(self.labels.values()), "unlisted": self.unlisted}
        said = f"{whole} texts are too long for the model and were"
        if self.left_out:
            first = self.left_out[min(self.left_out)]
            found["left out"] = f"{len(self.left_out):,}{said} skipped, first {first}; cut them with --truncate"
        if self.cut:
            found["cut"] = f"{len(self.cut):,}{said} cut, first {self.cut[min(self.cut)]}"
        return {kind: note for kind, note in found.items() if note}


class Samples:
    """DATA opened for a bundle. ``stream`` yields the examples once; ``count`` is their number, if known.

    At most ``samples`` are used: evenly spread if the number of samples is known, because data is often sorted,
    otherwise the first. With ``judged``, tokens of a masked language model are masked. ``tokenizer`` reads texts, by
    default as the manifest's bytes; a bundle with a tokenizer file needs `tokenizer_of`. ``shard`` (i, n) uses only the
    i-th of every n samples. ``seed`` gives a random order, which needs files.

    After the stream has ended, ``total`` is the number of samples of all shards, and ``rows`` the SHA-256 of their
    names and contents, for a shard only; ``notes`` are complete then too.

    Construction raises DataError for labels and for array names in files; iteration raises it for anything else.
    """

    def __init__(
        self,
        data: Data,
        manifest: Manifest,
        samples: int | None = None,
        judged: bool = False,
        tokenizer: Tokenizer | None = None,
        shard: tuple[int, int] = (1, 1),
        seed: int | None = None,
    ) -> None:
        if judged and isinstance(data, str | Path) and str(data) == RANDOM:
            raise DataError("random numbers cannot show accuracy", "give labeled data, or real inputs")
        self._task, self._judged, self._steps = manifest.task, judged, manifest.preprocessing
        self._specs = {spec.name: spec for spec in interface(manifest)[0]}
        self._tokenizer = tokenizer
        if tokenizer is None and isinstance(self._steps, TextPreprocessing):
            self._tokenizer = open_tokenizer(manifest, Path())
        self._labels = Labels(manifest)
        source = open_source(data, manifest)
        count = source.count
        if source.heads is not None:
            count = sum(1 for _ in map(self._check, source.heads()))
            if not count:
                raise DataError(f"{data} contains no samples", "give at least one")
        whole = count if samples is None or count is None else min(samples, count)
        self.notes = Notes(whole, self._labels.notes, unlisted=source.unlisted)
        self.count = None if whole is None else len(range(shard[0] - 1, whole, shard[1]))
        self.total, self._rows = 0, hashlib.sha256()
        if seed is not None and (whole is None or source.heads is None):
            raise DataError(f"{data} cannot be read in a random order", "write its samples to a file")
        self.stream = self._prepare_all(self._chosen(source, count, samples, shard, seed), shard)

    @property
    def rows(self) -> str:
        """SHA-256 of the names and contents of all samples so far, those of other shards included."""
        return self._rows.hexdigest()

    def _chosen(
        self, source: Source, count: int | None, samples: int | None, shard: tuple[int, int], seed: int | None
    ) -> Iterator[tuple[int, Row]]:
        """The rows to prepare, each with its position."""

        def rows() -> Iterator[tuple[int, Row]]:
            return enumerate(_spread(source.rows(), count, samples))

        for position, row in rows() if seed is None else _shuffled(rows, self.notes.count or 0, seed):
            for key, value in sorted(row[1].items()) if shard[1] > 1 else ():
                content = hashlib.sha256(_content(value)).hexdigest()
                self._rows.update(f"{row[0]} {key} {content}\n".encode(errors="replace"))
            self.total += 1
            if position % shard[1] == shard[0] - 1:
                yield position, row

    def _check(self, row: Row) -> None:
        """Raise DataError if a sample's label is unknown to the model, or an input is missing."""
        name, values = row[0], dict(row[1])
        self._label(values, name)
        for key, spec in self._specs.items():
            if key not in values and not is_mask(key) and not (self._tokenizer and "text" in values):
                raise _missing(name, spec, values)

    def _prepare_all(self, rows: Iterable[tuple[int, Row]], shard: tuple[int, int]) -> Iterator[Example]:
        """The examples, without texts that are too long. Raises DataError, also if a shard has no others."""
        fitting, first = False, None
        for position, (name, values) in rows:
            try:
                yield self._prepare(position, name, dict(values))
                fitting = True
            except DataError as error:
                if not isinstance(error.__cause__, LongTextError):
                    raise
                self.notes.left_out[position] = error.message
                first = first or error
        if not fitting and shard[1] > 1:
            raise DataError(f"shard {shard[0]}/{shard[1]} has no sample that fits the model", "use fewer shards")
        if first is not None and not fitting:
            raise first

    def _prepare(self, position: int, name: str, values: dict[str, Any]) -> Example:
        targets = self._label(values, name)
        labels = self._labels.seen(targets["label"]) if targets else ()
        try:
            source = self._preprocess(position, name, values)
            feeds = {}
            for key, spec in self._specs.items():
                if values.get(key) is None:
                    raise _missing(name, spec, values)
                feeds[key] = _fitted(values.pop(key), spec)
            check_masks({key: array[None] for key, array in feeds.items()}, tuple(self._specs.values()))
        except InputError as error:
            said = error.message if name in error.message else f"{name}: {error.message}"  # files' have the path
            raise DataError(said, error.hint) from error
        digest = digest_of(feeds)
        extras = {key: array for key, value in values.items() if (array := _plain(value)) is not None}
        feeds, targets = self._targets(name, feeds, extras | targets)
        return Example(name, feeds, targets, source, tuple(labels), digest, position)

    def _label(self, values: dict[str, Any], where: str) -> Arrays:
        """Remove the label from a sample's values and return it by name; empty without a label. Raises DataError."""
        given = [values.pop(name) for name in LABELS if name in values and name not in self._specs]
        if len(given) > 1:
            raise DataError(f"{where} has both `label` and `labels`", "give one of them: they mean the same")
        if not given or given[0] is None:
            return {}
        if self._labels.kind == "none":  # an ordinary array, for the user's own metric
            values["label"] = given[0]
            return {}
        return {"label": self._labels.read(given[0], where)}

    def _preprocess(self, position: int, name: str, values: dict[str, Any]) -> Path | Array | str | None:
        """Turn images, texts and frames into inputs, and add masks. Returns the readable form. Raises InputError."""
        source = None
        if isinstance(self._steps, ImagePreprocessing) and "image" in values:
            source, values["image"] = _image(values["image"], self._steps)
        if self._tokenizer is not None and "text" in values:
            source = values.pop("text")
            values |= {key: array[0] for key, array in self._tokenizer([source]).items()}
            if self._tokenizer.cuts(source):
                self.notes.cut[position] = name
        if isinstance(self._steps, FlowPreprocessing) and isinstance(frames := values.get("frames"), np.ndarray):
            pixels = frames[0] if frames.ndim == 5 and len(frames) == 1 else frames
            if pixels.dtype == np.uint8 and pixels.ndim == 4:  # (2, H, W, 3) to (2, 3, H, W) from −1 to 1
                values["frames"] = np.moveaxis((pixels / 255.0 * 2.0 - 1.0).astype(np.float32), -1, 1)
        missing = {key: spec for key, spec in self._specs.items() if is_mask(key) and key not in values}
        for key in values.keys() - self._specs.keys():
            if is_mask(key) and key.removesuffix("_mask") in self._specs:
                raise InputError(f"the model takes no mask {key!r}", "omit it if it masks nothing")
            if close := difflib.get_close_matches(key, missing, 1, 0.8):
                raise InputError(f"the model has no input {key!r}", f"did you mean {close[0]!r}?")
        values |= {key: np.ones(largest(spec), spec.dtype) for key, spec in missing.items()}
        return source

    def _targets(self, where: str, feeds: Arrays, targets: Arrays) -> tuple[Arrays, Arrays]:
        """The inputs, with tokens masked if masked tokens are the targets, and the targets of the outputs."""
        if self._task == "fill-mask" and self._judged and self._tokenizer is not None:
            masked, hidden = mask_tokens(feeds["tokens"], feeds["tokens_mask"], self._tokenizer)
            return {**feeds, "tokens": masked}, {"tokens": hidden}
        if self._task == "video-autoencoding":
            return feeds, {**feeds, **targets}
        if self._task == "optical-flow" and "flow" in targets:
            expected, flow = (*feeds["frames"].shape[-2:], 2), targets["flow"]
            if flow.shape != expected or flow.dtype.kind != "f":
                said = f"{where}: `flow` is {flow.dtype} of shape {list(flow.shape)}"
                raise DataError(said, f"give floats of shape {list(expected)}")
        return feeds, targets


def _content(value: Any) -> bytes:
    """A raw value as bytes; a path as its file's. Raises DataError."""
    if isinstance(value, Path):
        with reading(value, DataError):
            return value.read_bytes()
    array = _plain(value)
    if array is None:
        return repr(value).encode(errors="replace")
    return f"{array.dtype} {array.shape} ".encode() + array.tobytes()


def _plain(value: Any) -> Array | None:
    """An array of numbers or texts; None for anything else."""
    try:
        array = np.asarray(value)
    except ValueError:  # its rows differ in length
        return None
    return None if array.dtype.kind == "O" else array


def digest_of(arrays: Mapping[str, Array]) -> str:
    """The first 16 characters of the SHA-256 of arrays by name, without the batch."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def stack(batch: Sequence[Example], of: Literal["feeds", "targets"] = "feeds") -> Arrays:
    """Inputs or targets of several samples, stacked on a batch axis. Raises DataError if names or shapes differ."""
    rows: list[Arrays] = [getattr(example, of) for example in batch]
    for example, row in zip(batch, rows, strict=True):
        if row.keys() != rows[0].keys():
            raise partly_labelled(f"{(example if len(row) < len(rows[0]) else batch[0]).name} has none")
        for name, array in row.items():
            if array.shape != rows[0][name].shape:
                first = f"{batch[0].name} has {list(rows[0][name].shape)}"
                said = f"{example.name}: {name!r} has shape {list(array.shape)}, but {first}"
                raise DataError(said, "give all samples the same shape")
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def partly_labelled(said: str) -> DataError:
    """The error if only some samples have targets."""
    hint = "label all of them, or none; an image outside the class folders has no label"
    return DataError(f"only some samples have a label: {said}", hint)


def mask_tokens(tokens: Array, tokens_mask: Array, tokenizer: Tokenizer) -> tuple[Array, Array]:
    """``tokens`` (length,) with 15 % of the text masked, at least one token; and the hidden tokens, -1 elsewhere.

    The choice depends only on the text, so every model, run and machine hides the same tokens. Tokens that are already
    masked stay masked and are not scored, because their original values are unknown.
    """
    hidden = np.full(tokens.shape, -1, np.int64)
    candidates = np.flatnonzero(tokenizer.ordinary(tokens) & (tokens_mask == 1))
    if not len(candidates):
        return tokens, hidden
    generator = np.random.default_rng(zlib.crc32(tokens.astype("<i4").tobytes()))
    chosen = generator.choice(candidates, max(1, round(_SHARE * len(candidates))), replace=False)
    masked = tokens.copy()
    hidden[chosen], masked[chosen] = tokens[chosen], tokenizer.mask
    return masked, hidden


def _spread(items: Iterator[_T], count: int | None, samples: int | None) -> Iterator[_T]:
    """``samples`` of ``count`` items, evenly spread; the first ``samples`` if the number of items is unknown."""
    if count is None or samples is None or count <= samples:
        return itertools.islice(items, samples)
    wanted = {index * count // samples for index in range(samples)}
    return (item for index, item in enumerate(items) if index in wanted)


def _shuffled(rows: Callable[[], Iterator[tuple[int, Row]]], count: int, seed: int) -> Iterator[tuple[int, Row]]:
    """Rows in a random order. Reads them again for each block, because not all fit in memory."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    first = next((row for _, row in rows()), ("", {}))
    num_bytes = sum(getattr(value, "nbytes", 0) for value in first[1].values())
    size = min(_BLOCK, max(1, _BLOCK_BYTES // max(1, num_bytes)))
    for start in range(0, count, size):
        block = order[start : start + size]
        wanted = set(block)
        found = {position: row for position, row in rows() if position in wanted}
        yield from ((position, found[position]) for position in block)


def _image(image: Any, steps: ImagePreprocessing) -> tuple[Path | Array, Array]:
    """An image in readable form and as the model's input; a float array is already an input. Raises InputError."""
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":
        return image, image
    pixels = take_image(image)
    shown = Path(image) if isinstance(image, str) else image if isinstance(image, Path | np.ndarray) else pixels
    return shown, to_input(pixels, steps)


def _missing(where: str, spec: TensorSpec, values: Mapping[str, Any]) -> DataError:
    found = ", ".join(map(repr, values)) or "nothing"
    return DataError(f"{where} has no {spec.name!r}, only {found}", f"give {spec.dtype} {list(spec.shape[1:])}")


def _fitted(given: Any, spec: TensorSpec) -> Array:
    """The array in the model's dtype. Raises InputError for another shape or kind, NaN, or too large values."""
    dtype, shape = np.dtype(spec.dtype), spec.shape[1:]
    hint = f"give {dtype} {list(shape)}"
    if not isinstance(given, np.ndarray):
        raise InputError(f"{spec.name!r} is of type {type(given).__name__}", hint)
    array: Array = given[0] if given.ndim == len(spec.shape) and len(given) == 1 else given
    bounds = [spec.limits(axis) for axis in range(1, len(spec.shape))]
    fits = len(bounds) == array.ndim and all(
        low <= size <= high for (low, high), size in zip(bounds, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in ("f" if dtype.kind == "f" else "iub"):
        raise InputError(f"{spec.name!r} is {array.dtype} of shape {list(array.shape)}", hint)
    with np.errstate(over="ignore"):
        converted: Array = np.ascontiguousarray(array, dtype)
    if not np.isfinite(converted).all() or (dtype.kind != "f" and not np.array_equal(converted, array)):
        raise InputError(f"{spec.name!r} contains NaN, or values that {dtype} cannot represent", "correct the data")
    check_values(converted, spec)
    return converted
