# SPDX-License-Identifier: Apache-2.0
"""Split bundles: encode once, then decode all queries in one `run`, or only the queries that a caller chooses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.manifest import Manifest, TensorSpec, index_input, interface, misfit
from perceiver_export.runtimes.opening import certificates_of
from perceiver_export.runtimes.runtime import Array, Feeds, Runtime


def decode(
    decoder: Runtime, feeds: Feeds, queries: npt.ArrayLike, num_queries: int | None = None
) -> npt.NDArray[np.float32]:
    """The outputs (B, n, …) of ``queries``: flat indices, (n,) for all samples or (B, n).

    ``feeds`` are the decoder's other inputs: ``latents`` (B, N, D) and the inputs from which its queries are computed.
    A decoder with a fixed number of queries per call is called as often as needed, and the last call is padded with the
    last query. ``num_queries`` is the number of all queries, by default the bundle's. A decoder with a single query
    takes no indices, and its output is one row.

    Raises InputError: an index out of range, no queries, or a wrong shape.
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
    chunk = queries_a_call(spec, rows.shape[1])
    (output,) = (spec.name for spec in decoder.outputs)
    parts = []
    for start in range(0, rows.shape[1], chunk):
        part = rows[:, start : start + chunk]
        kept = part.shape[1]
        if kept < chunk:
            part = np.concatenate([part, np.repeat(part[:, -1:], chunk - kept, axis=1)], axis=1)
        parts.append(decoder.run({**feeds, spec.name: part})[output][:, :kept])
    return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def queries_a_call(indices: TensorSpec, count: int) -> int:
    """How many of ``count`` queries a decoder with this input of indices takes per call."""
    least, most = indices.limits(1)
    return max(least, min(most, count))


def _rows(queries: npt.ArrayLike, batch: int, num_queries: int | None) -> npt.NDArray[np.int32]:
    rows = np.asarray(queries)
    if rows.dtype.kind not in "iu" or rows.ndim not in (1, 2) or not rows.size:
        raise InputError(f"the queries are {rows.dtype} {list(rows.shape)}", "give integers (n,) or (batch, n), n ≥ 1")
    if rows.ndim == 2 and len(rows) != batch:
        raise InputError(f"the queries are for {len(rows)} samples, but the latents for {batch}", "give (batch, n)")
    least, most = int(rows.min()), int(rows.max())
    count = num_queries if num_queries is not None else 1 << 31
    if least < 0 or most >= count:
        wrong = least if least < 0 else most
        raise InputError(f"query {wrong} is out of range", f"give queries from 0 to {count - 1}")
    return np.broadcast_to(rows.astype(np.int32), (batch, rows.shape[-1]))


def join(bundle: Bundle, parts: Mapping[str, Runtime]) -> Runtime:
    """Join the parts of a split bundle, by name, behind one `run`. Raises BundleError: unsuitable decoders."""
    engine = JoinedEngine(bundle.manifest, parts)
    strict, held = parts["encoder"].check_finite, certificates_of(bundle, engine)
    precision = bundle.manifest.precision
    return Runtime(engine, engine.inputs, engine.outputs, precision, check_finite=strict, certificates=held)


class JoinedEngine:
    """Encoder and decoders as one engine with the inputs and outputs of the whole model."""

    def __init__(self, manifest: Manifest, parts: Mapping[str, Runtime]) -> None:
        _check(manifest)
        self._encoder = parts["encoder"]
        self._decoders = {part.outputs[0].name: part for name, part in parts.items() if name != "encoder"}
        self.inputs, self.outputs = interface(manifest)

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        encoded = self._encoder.run({spec.name: feeds[spec.name] for spec in self._encoder.inputs})
        outputs = {}
        for spec in self.outputs:
            decoder = self._decoders[spec.name]
            chosen = index_input(decoder.inputs)
            own = {one.name: {**feeds, **encoded}[one.name] for one in decoder.inputs if one is not chosen}
            if decoder.num_queries is None:
                outputs[spec.name] = decoder.run(own)[spec.name]
            else:
                rows = decode(decoder, own, np.arange(decoder.num_queries, dtype=np.int32))
                outputs[spec.name] = rows.reshape(-1, *(dim for dim in spec.shape[1:] if isinstance(dim, int)))
        if out is None:
            return outputs
        for name, array in outputs.items():
            np.copyto(out[name], array)
        return dict(out)

    def describe(self) -> dict[str, Any]:
        """The encoder's, but with the precision, arithmetic and flags of all parts: "bf16, fp32" if they differ."""
        parts = [self._encoder.describe(), *(decoder.describe() for decoder in self._decoders.values())]
        described = {name: value for name, value in parts[0].items() if name != "certificates"}
        for name in ("precision", "arithmetic"):
            if any(name in part for part in parts):
                described[name] = _listed(part.get(name, "unknown") for part in parts)
        flags = [part.get("flags", {}) for part in parts]
        if any(flags):
            names = dict.fromkeys(name for one in flags for name in one)
            described["flags"] = {name: _listed(one.get(name, "none") for one in flags) for name in names}
        return described


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _check(manifest: Manifest) -> None:
    """Raise BundleError unless each output has one decoder whose queries give the whole output."""
    decoders = {part.outputs[0].name: part for name, part in manifest.parts.items() if name != "encoder"}
    if not manifest.outputs or decoders.keys() != {spec.name for spec in manifest.outputs}:
        outputs = [spec.name for spec in manifest.outputs]
        raise misfit(f"the bundle has the outputs {outputs} but decoders for {sorted(decoders)}")
    for spec in manifest.outputs:
        part, elements = decoders[spec.name], _elements(spec)
        takes_queries = index_input(part.inputs) is not None
        rows = (part.num_queries or 0) * _elements(part.outputs[0], start=2) if takes_queries else elements
        if rows != elements or takes_queries != (part.num_queries is not None):
            raise misfit(f"the decoder's queries do not give the output {spec.name!r} of shape {spec.shape}")


def _elements(spec: TensorSpec, start: int = 1) -> int:
    return math.prod(dim for dim in spec.shape[start:] if isinstance(dim, int))
