# SPDX-License-Identifier: Apache-2.0
"""Split bundles: encode once, then decode every query behind one `run`, or only the queries that a caller wants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import BundleError, InputError
from perceiver_export.runtimes.manifest import Manifest, TensorSpec, index_input, interface
from perceiver_export.runtimes.runtime import Array, Feeds, Runtime


def decode(
    decoder: Runtime, feeds: Feeds, queries: npt.ArrayLike, num_queries: int | None = None
) -> npt.NDArray[np.float32]:
    """The outputs (B, n, …) of ``queries``: flat indices, (n,) for all samples alike or (B, n).

    ``feeds`` are the decoder's other inputs: ``latents`` (B, N, D) and whatever its queries are made of. A decoder
    with a fixed number of queries is called as often as needed, the last call padded with the last query.
    ``num_queries`` is how many there are, by default as the bundle says; a decoder of a single query takes no indices,
    and gives its output as one row.

    Raises InputError: an index below 0 or not below ``num_queries``, no query at all, or a shape that does not fit.
    """
    batch = len(feeds["latents"])
    num_queries = decoder.num_queries if num_queries is None else num_queries
    spec = index_input(decoder.inputs)
    if spec is None:
        rows = _rows(queries, batch, num_queries=1)
        (only,) = decoder.run(feeds).values()
        return np.repeat(only.reshape(batch, 1, -1), rows.shape[1], axis=1)
    rows = _rows(queries, batch, num_queries)
    if spec.shape[0] == 1:  # the same for all samples
        if (rows != rows[:1]).any():
            every, places = np.unique(rows, return_inverse=True)
            found = decode(decoder, feeds, every, num_queries)
            return np.take_along_axis(found, places.reshape(*rows.shape, *[1] * (found.ndim - 2)), axis=1)
        rows = rows[:1]
    chunk = _chunk_size(spec, rows.shape[1])
    (output,) = (spec.name for spec in decoder.outputs)
    parts = []
    for start in range(0, rows.shape[1], chunk):
        part = rows[:, start : start + chunk]
        kept = part.shape[1]
        if kept < chunk:
            part = np.concatenate([part, np.repeat(part[:, -1:], chunk - kept, axis=1)], axis=1)
        parts.append(decoder.run({**feeds, spec.name: part})[output][:, :kept])
    return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _rows(queries: npt.ArrayLike, batch: int, num_queries: int | None) -> npt.NDArray[np.int32]:
    rows = np.asarray(queries)
    if rows.dtype.kind not in "iu" or rows.ndim not in (1, 2) or not rows.size:
        raise InputError(
            f"queries are {rows.dtype} {list(rows.shape)}", "give one or more integers, (n,) or (batch, n)"
        )
    if rows.ndim == 2 and len(rows) != batch:
        raise InputError(f"queries are given for {len(rows)} samples, the latents are of {batch}", "give (batch, n)")
    least, most = int(rows.min()), int(rows.max())
    count = num_queries if num_queries is not None else 1 << 31
    if least < 0 or most >= count:
        wrong = least if least < 0 else most
        raise InputError(f"query {wrong} is out of range", f"the model has {count} queries, counted from 0")
    return np.broadcast_to(rows.astype(np.int32), (batch, rows.shape[-1]))


def _chunk_size(spec: TensorSpec, wanted: int) -> int:
    size = spec.shape[1]
    if isinstance(size, int):
        return size
    return min(spec.ranges[size][1], wanted) if size in spec.ranges else wanted


_AGAIN = "export the bundle again"


def join(manifest: Manifest, parts: Mapping[str, Runtime]) -> Runtime:
    """The parts of a split bundle, by name, behind one `run`. Raises BundleError: decoders that do not fit."""
    engine = JoinedEngine(manifest, parts)
    return Runtime(engine, engine.inputs, engine.outputs, manifest.precision)


class JoinedEngine:
    """Encoder and decoders as one engine: the inputs of all of them, and the outputs of the whole model."""

    def __init__(self, manifest: Manifest, parts: Mapping[str, Runtime]) -> None:
        _check(manifest)
        self._encoder = parts["encoder"]
        self._decoders = {
            decoder.outputs[0].name: (decoder, manifest.parts[name].num_queries)
            for name, decoder in parts.items()
            if name != "encoder"
        }
        self.inputs, self.outputs = interface(manifest)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        encoded = self._encoder.run({spec.name: feeds[spec.name] for spec in self._encoder.inputs})
        outputs = {}
        for spec in self.outputs:
            decoder, num_queries = self._decoders[spec.name]
            chosen = index_input(decoder.inputs)
            own = {one.name: {**feeds, **encoded}[one.name] for one in decoder.inputs if one is not chosen}
            if num_queries is None:
                outputs[spec.name] = decoder.run(own)[spec.name]
            else:
                rows = decode(decoder, own, np.arange(num_queries, dtype=np.int32), num_queries)
                outputs[spec.name] = rows.reshape(-1, *(dim for dim in spec.shape[1:] if isinstance(dim, int)))
        return outputs

    def run_into(self, feeds: Feeds, out: Mapping[str, Array]) -> None:
        for name, array in self.run(feeds).items():
            np.copyto(out[name], array)

    def describe(self) -> dict[str, Any]:
        return self._encoder.describe()


def _check(manifest: Manifest) -> None:
    """Raise BundleError unless there is one decoder for each output, with as many queries as the output holds."""
    decoders = {part.outputs[0].name: part for name, part in manifest.parts.items() if name != "encoder"}
    if not manifest.outputs or decoders.keys() != {spec.name for spec in manifest.outputs}:
        raise BundleError(
            f"the bundle gives {[spec.name for spec in manifest.outputs]}, its decoders {sorted(decoders)}", _AGAIN
        )
    for spec in manifest.outputs:
        part, elements = decoders[spec.name], _elements(spec)
        takes_queries = index_input(part.inputs) is not None
        rows = (part.num_queries or 0) * _elements(part.outputs[0], start=2) if takes_queries else elements
        if rows != elements or takes_queries != (part.num_queries is not None):
            raise BundleError(f"output {spec.name!r} of shape {spec.shape} does not fit its decoder's queries", _AGAIN)


def _elements(spec: TensorSpec, start: int = 1) -> int:
    return math.prod(dim for dim in spec.shape[start:] if isinstance(dim, int))
