# SPDX-License-Identifier: Apache-2.0
"""Where a quantized bundle goes wrong: each linear's own product against fp32's, on the same inputs, the worst first.

`measure_sensitivity` foretells, from an fp32 bundle, what int8 would cost each layer. This looks at a bundle as it is,
so it also finds a scale that was damaged, or made from the wrong data. Both graphs run with the products of all linears
as outputs; errors of earlier layers are in later ones too, but a layer that is wrong itself stands out from them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.collect import load_graph
from perceiver_export.calibration.feeds import Data, open_feeds
from perceiver_export.calibration.linears import Linear, find_linears
from perceiver_export.calibration.parts import batch_size, batches, run_parts, stack
from perceiver_export.calibration.sessions import open_session
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.runtime import Array, Feeds

_SAMPLES = 8
_EXACT = 200.0  # dB, which stands for equal


class LayerError(msgspec.Struct, frozen=True):
    """A layer: signal to noise of its product in dB, that of its worst run where it runs more than once."""

    part: str
    group: str
    sqnr: float


def measure_layer_errors(
    bundle: str | os.PathLike[str] | Bundle,
    reference: str | os.PathLike[str] | Bundle,
    data: Data,
    samples: int = _SAMPLES,
    threads: int | None = None,
) -> tuple[LayerError, ...]:
    """Compare the linears of two bundles of one model, the second in fp32; the worst layer first.

    Where smoothing was folded into a value projection its channels have other scales than in fp32: there each channel's
    best gain is taken out first. Raises UsageError where the bundles do not have the same linears, DataError.
    """
    opened, exact = open_bundle(bundle), open_bundle(reference)
    if opened.manifest.parts.keys() != exact.manifest.parts.keys():
        raise UsageError("the two bundles have different parts", "compare a bundle with the one it was made from")
    watched = {
        name: _Watched(opened.file(opened.part(name).file), exact.file(part.file), threads)
        for name, part in exact.manifest.parts.items()
    }
    examples = open_feeds(data, exact.manifest, samples)
    size = batch_size(exact.manifest)
    seen = 0
    for batch in batches(itertools.islice(examples.stream, samples), size):
        runs = {name: one.run for name, one in watched.items()}
        run_parts(exact.manifest, runs, stack(batch), np.random.default_rng(0))
        seen += 1
    if not seen:
        raise DataError("the data holds no samples", "it is empty, or a generator that was used up")
    found = [LayerError(name, group, sqnr) for name, one in watched.items() for group, sqnr in one.errors().items()]
    return tuple(sorted(found, key=lambda error: error.sqnr))


class _Watched:
    """Both graphs of a part, which give the products of their linears; signal and noise are summed up."""

    def __init__(self, quantized: Path, exact: Path, threads: int | None) -> None:
        model = load_graph(exact)
        linears = find_linears(model.graph)[0]
        self._products = {linear.name: (linear.group, _name(linear)) for linear in linears}
        self._outputs = [str(value.name) for value in model.graph.outputs]
        names = [name for _, name in self._products.values()]
        self._exact = _session(model, exact, names, threads)
        self._quantized = _session(load_graph(quantized), quantized, names, threads)
        self._sums: dict[str, Array] = {}

    def run(self, feeds: Feeds) -> Mapping[str, Array]:
        """The exact outputs; on the way the errors of all products are taken in."""
        exact, found = _results(self._exact, feeds), _results(self._quantized, feeds)
        for linear, (group, name) in self._products.items():
            signal = exact[name].reshape(-1, exact[name].shape[-1]).astype(np.float64)
            other = found[name].reshape(signal.shape).astype(np.float64)
            if ".value" in group:
                gains = (signal * other).sum(axis=0) / np.maximum(np.square(other).sum(axis=0), 1e-300)
                other = other * gains
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite shows in `errors`
                sums = np.array([np.square(signal).sum(), np.square(other - signal).sum()])
            self._sums[linear] = self._sums.get(linear, np.zeros(2)) + sums
        return {name: exact[name] for name in self._outputs}

    def errors(self) -> dict[str, float]:
        """SQNR by group, of its worst run; where a product is not finite as bad as can be."""
        found: dict[str, float] = {}
        for linear, (signal, noise) in self._sums.items():
            group = self._products[linear][0]
            ratio = -_EXACT
            if np.isfinite(noise):
                ratio = min(_EXACT, float(10 * np.log10(max(signal, 1e-300) / max(noise, 1e-300))))
            found[group] = min(found.get(group, _EXACT), ratio)
        return found


def _name(linear: Linear) -> str:
    return str((linear.bias_add or linear.node).outputs[0].name)


def _session(model: ir.Model, path: Path, names: list[str], threads: int | None) -> Any:
    """A session that gives these values as well. Raises UsageError where the graph has not all of them."""
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    missing = [name for name in names if name not in values]
    if missing:
        raise UsageError(f"{path} has no {missing[0]}", "compare a bundle with the one it was made from")
    given = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(values[name] for name in names if name not in given)
    return open_session(model, path.parent, threads)


def _results(session: Any, feeds: Feeds) -> dict[str, Array]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
