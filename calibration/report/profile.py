# SPDX-License-Identifier: Apache-2.0
"""`profile()`: the kernels that an engine really runs, one row per layer of the model.

A layer is a module: a node's name is the module's, a slash, and its operator. A node of the whole model is a layer of
its own. Engines fuse, split and add nodes, but their kernels keep names of nodes and tensors, which assign them to
layers. A kernel belongs to the layer of its product, or else of its first node. A kernel without a name, such as a
type conversion, belongs to the layer that runs next. Layers with neither kernel nor product are omitted. The graph is
compiled as in `load`, but with the engine's profiler on, which takes some time itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.data.sources import Data
from perceiver_export.calibration.graphs import PRODUCTS, node_flops, reached, read_graph, set_sizes, with_shapes
from perceiver_export.calibration.quantization import engines
from perceiver_export.calibration.quantization.record import Calibration, LinearRecord, read_calibration
from perceiver_export.calibration.quantization.sensitivity import measure_layer_errors
from perceiver_export.calibration.report.peaks import Peaks, measure_peaks
from perceiver_export.calibration.report.tables import Table
from perceiver_export.runtimes.benchmark import Side
from perceiver_export.runtimes.bundle import Bundle, BundleLike, open_bundle
from perceiver_export.runtimes.engines.backend import (
    EngineOptions,
    Kernel,
    Precision,
    PrecisionChoice,
    Source,
    find_target,
)
from perceiver_export.runtimes.engines.cache import Candidate
from perceiver_export.runtimes.errors import EngineError, UsageError
from perceiver_export.runtimes.manifest import Part, index_input
from perceiver_export.runtimes.opening import check_threads, engine_for
from perceiver_export.runtimes.presence import choose_precision, choose_target
from perceiver_export.runtimes.runtime import Array, quartiles, scattered
from perceiver_export.runtimes.split import queries_a_call

_COLUMNS = (
    *("layer", "asked", "built", "kernel", "ms>", "share>", "× against>", "MiB>", "GFLOP/s>", "GB/s>", "of the peak>"),
    *("SQNR, dB>", "alone, dB>"),
)
_SECONDS = 1.0  # of timing a bundle


class LayerProfile(msgspec.Struct, frozen=True):
    """``kernel`` runs (most of) the layer's product; ``built`` is the type of its inputs.

    ``milliseconds`` and ``against`` (the other bundle's) are medians per run; ``share`` is of the time of all kernels.
    ``flops`` counts the layer's products, ``bytes`` its kernels' reads and writes. ``roofline``: the least time at the
    machine's peaks as a share of the measured time; memory counts only where no cache holds a kernel's data. In dB:
    ``sqnr`` of the layer's product against fp32's, and ``loss``, that of the outputs with only this layer quantized.
    """

    part: str
    layer: str
    asked: str
    built: str
    kernel: str
    milliseconds: float
    share: float
    flops: int
    bytes: int
    roofline: float | None = None
    sqnr: float | None = None
    loss: float | None = None
    against: float | None = None


class Profile(msgspec.Struct, frozen=True):
    """``milliseconds`` is the sum of the layers' medians. ``peaks``: FLOP/s of the fastest product by type, ``memory``:
    bytes/s of a large sum, both of this engine on this machine. ``unsteady``: why the times of either bundle are too
    unsteady to compare; empty if they are not. ``calls``: the decoders that a run calls several times, and how often; a
    layer's figures are for all these calls. ``against``: the other bundle and its precision.
    """

    bundle: str
    target: str
    engine: str
    precision: str
    milliseconds: float
    layers: tuple[LayerProfile, ...]
    peaks: dict[str, float]
    memory: float
    unsteady: str = ""
    calls: dict[str, int] = {}
    against: str = ""

    def worst(self, by: str = "time") -> tuple[LayerProfile, ...]:
        """The layers by ``time``, slowest first, or by ``loss`` and then their own SQNR, lowest dB first."""
        if by == "time":
            return tuple(sorted(self.layers, key=lambda one: -one.milliseconds))
        worst = (tuple(np.inf if it is None else it for it in (one.loss, one.sqnr)) for one in self.layers)
        return tuple(one for _, one in sorted(zip(worst, self.layers, strict=True), key=lambda pair: pair[0]))

    def table(self, by: str = "time", most: int | None = None) -> Table:
        """The first ``most`` layers, without empty columns."""
        rows, several = [], len({one.part for one in self.layers}) > 1
        for one in self.worst(by)[:most]:
            seconds = one.milliseconds / 1e3
            rates = [f"{done / seconds / 1e9:,.1f}" if done and seconds else "" for done in (one.flops, one.bytes)]
            faster = f"{one.milliseconds / one.against:.2f}" if one.against else ""
            rows.append(
                (
                    *(f"{one.part}: {one.layer}" if several else one.layer, one.asked, one.built, one.kernel),
                    *((f"{one.milliseconds:.3f}", f"{one.share:.1%}") if self.milliseconds else ("", "")),
                    *(faster, f"{one.bytes / 2**20:,.2f}" if one.bytes else "", *rates),
                    "" if one.roofline is None else f"{one.roofline:.0%}",
                    *("" if found is None else f"{found:.1f}" for found in (one.sqnr, one.loss)),
                )
            )
        peaks = ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {kind}" for kind, peak in self.peaks.items())
        memory = f"{self.memory / 1e9:,.1f} GB/s for data that no cache holds"
        notes = [f"The times are too unsteady to compare: {self.unsteady}."] * bool(self.unsteady)
        notes += [f"× against: {self.against}, timed alternately."] * bool(self.against)
        if self.peaks:
            notes.append(f"Of the peak: the shortest possible time, with {peaks} and {memory}, over the measured time.")
        notes += [f"A run calls {part} {count:,} times; figures cover all." for part, count in self.calls.items()]
        if any(one.sqnr is not None for one in self.layers):
            notes.append("SQNR: the layer's own product against fp32's, at calibration or on the given data.")
        if any(one.loss is not None for one in self.layers):
            notes.append("Alone: SQNR of the outputs with only this layer quantized.")
        elif by == "loss":
            notes.append("No layer's loss was measured; `quantize --sensitivity` measures it.")
        scheme, _, lower = self.precision.partition(" with ")
        if lower and any((one.sqnr, one.loss) != (None, None) for one in self.layers):
            notes.append(f"Figures in dB compare {scheme} with fp32, not with {lower}.")
        title = f"{self.bundle} in {self.precision} on {self.target}, {self.engine}"
        if not self.milliseconds:  # the build's report
            return Table(title, _COLUMNS, rows, "From the engine's builder, which times no layers.").without_empty()
        title += f": {self.milliseconds:.2f} ms, the layers' medians added up"
        return Table(title, _COLUMNS, rows, " ".join(notes)).without_empty()


def profile(
    bundle: BundleLike,
    *,
    device: str = "auto",
    precision: PrecisionChoice | None = None,
    against: BundleLike | None = None,
    against_precision: Precision | None = None,
    data: Data | None = None,
    threads: int | None = None,
) -> Profile:
    """Profile a bundle as `load` runs it with these options, on its golden inputs; a split bundle decodes all queries.

    A bundle ``against`` is profiled alternately on the same target, as `load` runs it in ``against_precision``. With
    ``data``, ``sqnr`` is measured against it (the float bundle that this one was quantized from); otherwise it is the
    value that `quantize` recorded on the calibration samples.

    Raises DeviceError if the target does not report its kernels, UsageError if the two bundles share no layer or
    ``data`` comes without a float bundle, DataError, and the errors of `load`.
    """
    check_threads(threads)
    opened, other = open_bundle(bundle), None if against is None else open_bundle(against)
    sqnr, loss = _accuracy(opened, other, data, threads)
    target = choose_target(opened, precision, threads) if device == "auto" else device
    wanted = choose_precision(opened, target, threads) if precision == "auto" else precision
    found = _Run(opened, target, wanted, threads)
    beside = None if other is None else _Run(other, target, against_precision, threads)
    _measure_in_turn([found] if beside is None else [found, beside])
    if beside is not None and not found.kernels.keys() & beside.kernels.keys():
        raise UsageError(f"{beside.bundle.path} has none of these layers", "compare with a bundle of the same model")
    peaks, layers, total = _peaks(found), [], found.total
    for key in found.kernels:
        main, time, flops, moved = found.main(key), found.time(key), found.flops[key], found.moved(key)
        least = peaks.milliseconds(flops, main.precision, moved)
        layers.append(
            LayerProfile(
                *(*key, found.asked(*key), found.built(key), main.kernel),
                *(time, time / total if time else 0.0, flops, sum(moved), least / time if least and time else None),
                *(sqnr.get(key), loss.get(key)),
                None if beside is None or key not in beside.kernels else beside.time(key),
            )
        )
    described = (opened.manifest.name, target, found.engine, found.precision, total)
    unsteady = found.unsteady or ("" if beside is None else beside.unsteady)
    calls = {part: count for part, count in found.calls.items() if count > 1}
    named = "" if beside is None else f"{beside.bundle.manifest.name} in {beside.precision}"
    return Profile(*described, tuple(layers), peaks.products, peaks.memory, unsteady, calls, named)


def _peaks(run: _Run) -> Peaks:
    """The peaks of the types that the products run in."""
    products = (one for kernels in run.kernels.values() for one in kernels if one.product and one.times)
    peaks = measure_peaks(run.target, tuple(sorted({one.precision for one in products} - {""})), run.threads)
    for key in run.kernels:
        peaks = peaks.beside(run.flops[key], run.main(key).precision, run.moved(key), run.time(key))
    return peaks


_Key = tuple[str, str]  # part and layer


class _Run:
    """The kernels of a bundle on a target, by part and layer; ``calls`` counts each part's calls in a run."""

    def __init__(self, bundle: Bundle, target: str, wanted: Precision | None, threads: int | None) -> None:
        self.bundle, self.target, self.threads = bundle, target, threads
        self.engine = self.precision = self.unsteady = ""
        self.kernels: dict[_Key, list[Kernel]] = {}
        self.flops: dict[_Key, int] = {}
        self.calls: dict[str, int] = {}
        self._schemes = {key: one.scheme for key, one in _linears(read_calibration(bundle))}
        options = EngineOptions(precision=wanted or "fp32")
        self.parts: dict[str, tuple[Source, dict[str, Array], Candidate | None]] = {}
        for name, part in bundle.manifest.parts.items():
            source, engine, _ = engine_for(bundle, name, target, options, wanted)
            feeds, self.calls[name] = self._feeds(name, part)
            self.parts[name] = (source, feeds, engine)
            self._float = source.options.precision
            self.precision = source.precision if self._float == "fp32" else source.compiled_precision

    def take(self, name: str, found: engines.Kernels) -> None:
        """Store the kernels that were read for a part."""
        source, feeds, _ = self.parts[name]
        self.engine, kernels = found
        model = read_graph(source.graph)
        set_sizes(model.graph, feeds)
        for layer, (own, flops) in _by_layer(with_shapes(model).graph, kernels).items():
            self.kernels[name, layer], self.flops[name, layer] = own, flops * self.calls[name]
        where = f"{self.bundle.path.name} ({name})"
        self.unsteady = self.unsteady or scattered(where, *quartiles(engines.totals(kernels)))

    def _feeds(self, name: str, part: Part) -> tuple[dict[str, Array], int]:
        """The inputs of a call of a part, and how many such calls decode all queries."""
        feeds = Side(str(self.bundle.path), self.target, name, self.threads).feeds(part.inputs)
        indices = index_input(part.inputs)
        if indices is None or part.num_queries is None:
            return feeds, 1
        size, rows = queries_a_call(indices, part.num_queries), feeds[indices.name]
        return feeds | {indices.name: np.resize(rows, (len(rows), size))}, -(-part.num_queries // size)

    def read(self, name: str, seconds: float) -> engines.Reading:
        """Time the graph if it compiles in seconds; else read the built engine. Raises EngineError if there is none."""
        source, feeds, engine = self.parts[name]
        if not find_target(self.target).needs_engine:
            how = engines.Timing(seconds, self.threads)
            return (yield from engines.reading(self.target, source.graph, feeds, source.options, how))
        if engine is None:
            build = f"perceiver-export build {self.bundle.path} --target {self.target}"
            raise EngineError(f"no engine of {name} has been built for {self.target} here", f"build it: {build}")
        return f"{self.target} {engine.record.identity.platform.version}", engines.built_kernels(engine.directory)

    @property
    def total(self) -> float:
        """Milliseconds of all layers."""
        return sum(map(self.time, self.kernels))

    def asked(self, part: str, layer: str) -> str:
        """The scheme that the layer was quantized in, or else the engine's precision."""
        scheme = self._schemes.get((part, layer), "float")
        return self._float if scheme == "float" else scheme

    def main(self, key: _Key) -> Kernel:
        """The slowest kernel of the layer's products, or of the whole layer if it has none."""
        return max(self.kernels[key], key=lambda one: (one.product, float(np.sum(one.times))), default=engines.MISSING)

    def built(self, key: _Key) -> str:
        """The types of the layer's products, or of all its kernels if it has none; the slowest first."""
        kernels = sorted(self._ran(key), key=lambda one: (-one.product, -float(np.sum(one.times))))
        found = [one.precision for one in kernels if one.precision and one.product == kernels[0].product]
        return ", ".join(dict.fromkeys(found))

    def _ran(self, key: _Key) -> list[Kernel]:
        """The kernels that take time; constants, and reshapes that move no data, take none."""
        return [one for one in self.kernels[key] if any(one.times) or not one.times]

    def moved(self, key: _Key) -> list[int]:
        """Bytes of each kernel in each call."""
        return [one.num_bytes for one in self._ran(key)] * self.calls[key[0]]

    def time(self, key: _Key) -> float:
        """Median milliseconds of a run."""
        kernels = [one for one in self.kernels.get(key, ()) if one.times]
        return float(np.median(engines.totals(kernels))) * self.calls[key[0]] if kernels else 0.0


def _measure_in_turn(runs: Sequence[_Run]) -> None:
    parts = [(run, name) for run in runs for name in run.parts]
    found = engines.read_in_turn(run.read(name, _SECONDS * len(parts)) for run, name in parts)
    for (run, name), kernels in zip(parts, found, strict=True):
        run.take(name, kernels)


def _by_layer(graph: ir.Graph, kernels: Sequence[Kernel]) -> dict[str, tuple[list[Kernel], int]]:
    """Each layer's kernels and the FLOPs of its products, in the graph's order."""
    makers: dict[str, ir.Node] = {}
    found: dict[str, tuple[list[Kernel], int]] = {}
    for node in graph:
        makers |= dict.fromkeys((_name(node), *(str(value.name) for value in node.outputs)), node)
        own, flops = found.setdefault(_layer_of(_name(node)), ([], 0))
        found[_layer_of(_name(node))] = (own, flops + node_flops(node) * (node.op_type in PRODUCTS))
    following = next(iter(makers.values()), None)
    for kernel in reversed(kernels):
        known = [makers[name] for one in kernel.names for name in _with_parents(one) if name in makers]
        if kernel.product:  # it may have only the name of a node that was fused after it
            values = [value for node in known for value in node.outputs]
            behind = reached(values, lambda node: node.op_type not in PRODUCTS)
            products = [node for node in (*known, *behind) if node.op_type in PRODUCTS]
            known = products or known
        following = known[0] if known else following
        if following is not None:
            found[_layer_of(_name(following))][0].append(kernel)
    return {layer: own for layer, own in found.items() if any(own)}


def _name(node: ir.Node) -> str:
    return str(node.name or node.outputs[0].name)


def _with_parents(name: str) -> Iterator[str]:
    """``a/b/c``, ``a/b`` and ``a``: engines append to the names of the nodes that they derive."""
    while name:
        yield name
        name = name.rpartition("/")[0]


def _linears(record: Calibration | None) -> list[tuple[_Key, LinearRecord]]:
    parts = {} if record is None else record.parts
    return [((name, _layer_of(one.name)), one) for name, part in parts.items() for one in part.linears]


def _layer_of(node: str) -> str:
    module = node.rpartition("/")[0]
    return node if module in ("", "model") else module


def _accuracy(
    bundle: Bundle, against: Bundle | None, data: Data | None, threads: int | None
) -> tuple[dict[_Key, float], dict[_Key, float]]:
    """SQNR by layer: of its own products, and of the outputs with only it quantized; the worst of several runs."""
    own: dict[_Key, float] = {}
    loss: dict[_Key, float] = {}
    linears = _linears(read_calibration(bundle))
    errors = {}
    if data is not None:
        if against is None or against.manifest.quantization is not None or not linears:
            raise UsageError("--data compares an int8 bundle's layers with float", "give --against FLOAT_BUNDLE too")
        errors = {
            (one.part, one.group): one.sqnr for one in measure_layer_errors(bundle, against, data, threads=threads)
        }
    for key, linear in linears:
        error = errors.get((key[0], linear.group), linear.sqnr)
        if error is not None:
            own[key] = min(own.get(key, np.inf), error)
    for key, linear in linears or _linears(None if against is None else read_calibration(against)):
        if linear.output_sqnr is not None:
            loss[key] = linear.output_sqnr
    return own, loss
