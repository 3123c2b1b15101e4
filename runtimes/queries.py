# SPDX-License-Identifier: Apache-2.0
"""Decoding only what is asked for: any number of queries through a decoder that takes a fixed number at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.runtime import Feeds, Runtime


def decode(
    decoder: Runtime, feeds: Feeds, queries: npt.ArrayLike, num_queries: int | None = None
) -> npt.NDArray[np.float32]:
    """The outputs (B, n, E) of ``queries``: flat indices, (n,) for all samples alike or (B, n).

    ``feeds`` are the decoder's other inputs: ``latents`` (B, N, D) and whatever its queries are made of. A decoder
    with a fixed number of queries is called as often as needed, the last call padded with the last query.
    ``num_queries`` is how many there are, by default as the bundle says; a decoder of a single query takes no indices,
    and gives its output as one row.

    Raises InputError: an index below 0 or not below ``num_queries``, no query at all, or a shape that does not fit.
    """
    batch = len(feeds["latents"])
    num_queries = decoder.num_queries if num_queries is None else num_queries
    if all(spec.name != "queries" for spec in decoder.inputs):
        rows = _rows(queries, batch, num_queries=1)
        (only,) = decoder.run(feeds).values()
        return np.repeat(only.reshape(batch, 1, -1), rows.shape[1], axis=1)
    rows = _rows(queries, batch, num_queries)
    chunk = _chunk_size(decoder, rows.shape[1])
    (output,) = (spec.name for spec in decoder.outputs)
    parts = []
    for start in range(0, rows.shape[1], chunk):
        part = rows[:, start : start + chunk]
        kept = part.shape[1]
        if kept < chunk:
            part = np.concatenate([part, np.repeat(part[:, -1:], chunk - kept, axis=1)], axis=1)
        parts.append(decoder.run({**feeds, "queries": part})[output][:, :kept])
    return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _rows(queries: npt.ArrayLike, batch: int, num_queries: int | None) -> npt.NDArray[np.int32]:
    rows = np.asarray(queries)
    if rows.dtype.kind not in "iu" or rows.ndim not in (1, 2) or not rows.size:
        raise InputError(
            f"queries are {rows.dtype} with shape {list(rows.shape)}", "give one or more integers, (n,) or (batch, n)"
        )
    if rows.ndim == 2 and len(rows) != batch:
        raise InputError(f"queries are given for {len(rows)} samples, the latents are of {batch}", "give (batch, n)")
    least, most = int(rows.min()), int(rows.max())
    count = num_queries if num_queries is not None else 1 << 31
    if least < 0 or most >= count:
        wrong = least if least < 0 else most
        raise InputError(f"query {wrong} is out of range", f"the model has {count} queries, counted from 0")
    return np.broadcast_to(rows.astype(np.int32), (batch, rows.shape[-1]))


def _chunk_size(decoder: Runtime, wanted: int) -> int:
    spec = next(spec for spec in decoder.inputs if spec.name == "queries")
    size = spec.shape[1]
    if isinstance(size, int):
        return size
    return min(spec.ranges[size][1], wanted) if size in spec.ranges else wanted
