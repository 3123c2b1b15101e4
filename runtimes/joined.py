# SPDX-License-Identifier: Apache-2.0
"""A split bundle behind one `run`: encode once, then decode every query, as many a call as the decoders take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from perceiver_export.runtimes.errors import BundleError
from perceiver_export.runtimes.manifest import Manifest, TensorSpec
from perceiver_export.runtimes.queries import decode
from perceiver_export.runtimes.runtime import Array, Feeds, Runtime

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
        self.inputs = _inputs(parts)
        self.outputs = manifest.outputs

    def run(self, feeds: Feeds) -> dict[str, Array]:
        encoded = self._encoder.run({spec.name: feeds[spec.name] for spec in self._encoder.inputs})
        outputs = {}
        for spec in self.outputs:
            decoder, num_queries = self._decoders[spec.name]
            own = {one.name: {**feeds, **encoded}[one.name] for one in decoder.inputs if one.name != "queries"}
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
        takes_queries = any(one.name == "queries" for one in part.inputs)
        rows = (part.num_queries or 0) * _elements(part.outputs[0], start=2) if takes_queries else elements
        if rows != elements or takes_queries != (part.num_queries is not None):
            raise BundleError(f"output {spec.name!r} of shape {spec.shape} does not fit its decoder's queries", _AGAIN)


def _elements(spec: TensorSpec, start: int = 1) -> int:
    return math.prod(dim for dim in spec.shape[start:] if isinstance(dim, int))


def _inputs(parts: Mapping[str, Runtime]) -> tuple[TensorSpec, ...]:
    """Each once: those of the encoder, then what decoders take beside latents and indices."""
    specs = {spec.name: spec for part in parts.values() for spec in part.inputs}
    return tuple(spec for name, spec in specs.items() if name not in ("latents", "queries"))
