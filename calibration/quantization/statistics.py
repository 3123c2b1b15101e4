# SPDX-License-Identifier: Apache-2.0
"""Collect the statistics for every scheme in one pass over the data.

For each activation that linear layers read, these are the exact bounds of every channel and a bounded sample of rows.
Ranges, smoothing and bias corrections are computed from them. Memory depends on the number and widths of tensors, not
on the number of samples.

Reductions run inside the graph, so that only a few numbers leave it instead of whole tensors: all tensors of one
ImageNet image take 3.4 GB. A reduction runs directly after its tensor, which need not be kept alive. Rows are drawn at
random positions, new ones in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.data.calls import Call, Run, batch_size, batches, run_parts, skip_parts
from perceiver_export.calibration.data.fingerprints import DataReport, DataWatch
from perceiver_export.calibration.data.samples import Samples, stack
from perceiver_export.calibration.data.sources import ITERABLE, RANDOM, Data
from perceiver_export.calibration.graphs import Behind, constant, dims, load_graph, open_session, run_session
from perceiver_export.calibration.quantization.linears import Linear, find_linears
from perceiver_export.calibration.quantization.options import QuantizeOptions
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks.tokenizers import tokenizer_of, truncating

Report = Callable[[str, int, int], None]

NO_SAMPLES = ("the data contains no samples", "give data that is not empty; a generator can be read only once")
_PLACES = "calibration.places"  # an extra input: the positions of the rows to sample, in [0, 1)
_VALUES_A_TENSOR = 1 << 17
_BYTES = 64 << 20  # for the samples of all tensors together
KEPT = 8  # calls whose feeds and outputs are kept to measure the effect of quantization
_RANDOM_SAMPLES = 32
_LARGEST_FLOAT16 = 65_504.0


@dataclass
class Activation:
    """An input of linear layers. ``low`` and ``high`` (K) are each channel's exact bounds; ``rows`` (capacity, K) holds
    a uniform sample of the rows ``seen``; ``own`` (capacity) marks the rows that came from calls of this shard.
    """

    low: Array
    high: Array
    rows: Array
    own: Array
    seen: int = 0

    @classmethod
    def empty(cls, width: int, capacity: int) -> Activation:
        """An activation without data, with room for ``capacity`` rows."""
        bounds = np.full(width, np.inf, np.float32)
        return cls(bounds, -bounds, np.zeros((capacity, width), np.float32), np.zeros(capacity, bool))

    def add(self, low: Array, high: Array, rows: Array, generator: np.random.Generator) -> None:
        """Add one call's bounds and rows."""
        np.minimum(self.low, low, out=self.low)
        np.maximum(self.high, high, out=self.high)
        for place, row in zip(self.places(len(rows), generator), rows, strict=True):
            if place < len(self.rows):
                self.rows[place], self.own[place] = row, True

    def places(self, count: int, generator: np.random.Generator) -> Iterator[int]:
        """The places of a call's rows; rows beyond the capacity replace earlier ones (Vitter's algorithm R).

        No row of this shard remains at these places.
        """
        for _ in range(count):
            place = self.seen if self.seen < len(self.rows) else int(generator.integers(self.seen + 1))
            if place < len(self.rows):
                self.own[place] = False
            self.seen += 1
            yield place

    @property
    def sample(self) -> Array:
        """The kept rows (n, K)."""
        return self.rows[: self.seen]

    @property
    def largest(self) -> Array:
        """The largest absolute value of each channel (K)."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def scaled(self, factors: Array) -> Activation:
        """The activation with each channel multiplied by a positive factor."""
        return Activation(self.low * factors, self.high * factors, self.rows * factors, self.own, self.seen)


@dataclass
class Hazard:
    """A tensor that may overflow fp16: its largest absolute value, and the number of products or terms in its sum."""

    largest: float
    depth: int

    @property
    def overflows(self) -> bool:
        """Whether a value, or a sum of ``depth`` ones as in a softmax, exceeds fp16's largest number."""
        return max(self.largest, self.depth) > _LARGEST_FLOAT16


@dataclass
class Statistics:
    """One graph's statistics by tensor name: inputs of linear layers, and tensors that may overflow fp16."""

    activations: dict[str, Activation]
    hazards: dict[str, Hazard]

    def of(self, linear: Linear) -> Activation:
        """The activation that a linear layer reads."""
        return self.activations[str(linear.activation.name)]


class Observer:
    """Observes a graph while it runs, and adds to ``statistics`` in each call.

    ``samples`` is the number of calls to come; the kept rows are spread over all of them.
    """

    def __init__(self, path: Path, samples: int, threads: int | None = None) -> None:
        model = load_graph(path)
        # In the graph's order, so that the same data always draws the same rows.
        activations = dict.fromkeys(linear.activation for linear in find_linears(model.graph)[0])
        self._outputs = [value.name or "" for value in model.graph.outputs]
        limit = min(_VALUES_A_TENSOR, _BYTES // 4 // max(1, len(activations)))
        capacity = {value: max(1, limit // _width(value)) for value in activations}
        rows = {value: -(-kept // max(1, samples)) for value, kept in capacity.items()}
        self._counts = {str(value.name): count for value, count in rows.items()}  # rows of one call
        self._rows = max(rows.values(), default=0)
        self._generator = np.random.default_rng(0)
        hazards = {value: depth for node in model.graph for value, depth in _hazardous(node)}
        self.statistics = Statistics(
            {str(value.name): Activation.empty(_width(value), kept) for value, kept in capacity.items()},
            {str(value.name): Hazard(0.0, depth) for value, depth in hazards.items()},
        )
        _watch(model.graph, rows, hazards)
        self._session = open_session(model, path.parent, threads, in_order=True)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run one call and return the graph's own outputs. Raises DataError if a value is NaN or infinite."""
        places = {_PLACES: self._generator.random(self._rows, np.float32)} if self._rows else {}
        values = run_session(self._session, {**feeds, **places})
        # Bounds alone would not reveal a NaN: onnxruntime's ReduceMax ignores it, except in the first row.
        for name in self._outputs:
            _require_finite(name, values[name])
        for name, activation in self.statistics.activations.items():
            low, high, rows = (values[f"{name}.{what}"] for what in ("low", "high", "rows"))
            _require_finite(name, low, high, rows)
            activation.add(low, high, rows, self._generator)
        for name, hazard in self.statistics.hazards.items():
            hazard.largest = max(-float(values[f"{name}.least"]), float(values[f"{name}.most"]), hazard.largest)
        return {name: values[name] for name in self._outputs}

    def skip(self) -> None:
        """Draw the random numbers of a call that another shard runs."""
        if self._rows:
            self._generator.random(self._rows, np.float32)
        for name, activation in self.statistics.activations.items():
            for _ in activation.places(self._counts[name], self._generator):
                pass


def _require_finite(name: str, *arrays: Array) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise DataError(f"the model computes NaN or infinity in {name}", "check the data and the checkpoint for them")


def _watch(graph: ir.Graph, rows: Mapping[ir.Value, int], hazards: Iterable[ir.Value]) -> None:
    """Add outputs for the bounds and rows of activations, and for the bounds of hazards."""
    scalars = constant(graph, "calibration.flat", np.array([-1], np.int64))
    axis = constant(graph, "calibration.first", np.array([0], np.int64))
    places = ir.Value(name=_PLACES, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None]))
    if rows:
        graph.inputs.append(places)
    for value in sorted(rows, key=lambda one: str(one.name)):
        width, behind = _width(value), Behind(graph, value)
        flat = constant(graph, f"calibration.rows_of_{width}", np.array([-1, width], np.int64))
        matrix = behind.add("Reshape", [value, flat], "matrix")
        behind.output("ReduceMin", [matrix, axis], "low", keepdims=0)
        behind.output("ReduceMax", [matrix, axis], "high", keepdims=0)
        _sample_rows(behind, matrix, places, rows[value])
    for value in hazards:
        behind = Behind(graph, value)
        flat_value = behind.add("Reshape", [value, scalars], "flat")
        behind.output("ReduceMin", [flat_value], "least", keepdims=0)
        behind.output("ReduceMax", [flat_value], "most", keepdims=0)


def _sample_rows(behind: Behind, matrix: ir.Value, places: ir.Value, count: int) -> None:
    """Add rows = matrix[floor(places[:count] × number of rows)]; the graph computes this number, since it may vary."""
    zero = behind.constant("zero", np.array([0], np.int64))
    wanted = behind.constant("wanted", np.array([count], np.int64))
    one = behind.constant("one", np.array(1, np.int64))
    shape = behind.add("Shape", [matrix], "shape", start=0, end=1)
    taken = behind.add("Slice", [places, zero, wanted], "taken")
    total = behind.add("Cast", [shape], "total", to=ir.DataType.FLOAT)
    scaled = behind.add("Mul", [taken, total], "scaled")
    indices = behind.add("Cast", [scaled], "indices", to=ir.DataType.INT64)
    last = behind.add("Sub", [shape, one], "last")
    bounded = behind.add("Min", [indices, last], "bounded")  # 0.99999997 × M may round up to M
    behind.output("Gather", [matrix, bounded], "rows", axis=0)


def _hazardous(node: ir.Node) -> list[tuple[ir.Value, int]]:
    """Tensors of a node that may overflow fp16, with the number of terms in their sums."""
    output, source = node.outputs[0], node.inputs[0] if node.inputs else None
    if output.dtype != ir.DataType.FLOAT:
        return []
    if node.op_type in ("MatMul", "Conv", "Pow", "Add"):
        return [(output, _width(source) if node.op_type == "MatMul" else 1)]
    return [(source, _width(source))] if node.op_type in ("Softmax", "ReduceSum") and source is not None else []


def _width(value: ir.Value | None) -> int:
    """The size of the last axis."""
    return (dims(value) or (1,))[-1]


@dataclass(frozen=True)
class Observation:
    """The result of the pass: statistics by part, a description of the data, and the first calls, in fp32."""

    statistics: dict[str, Statistics]
    data: DataReport
    calls: tuple[Call, ...]


def observe(
    bundle: Bundle, data: Data, options: QuantizeOptions, report: Report, shard: tuple[int, int] = (1, 1)
) -> Observation:
    """Run up to ``options.samples`` samples through all parts; for a ``shard`` (i, n), only the i-th of every n calls.

    A shard reads all samples. Raises DataError if there are none, and the errors of `Samples`.
    """
    samples = min(options.samples, _RANDOM_SAMPLES) if str(data) == RANDOM else options.samples
    tokenizer = tokenizer_of(truncating(bundle) if options.truncate else bundle)
    manifest = bundle.manifest
    size = batch_size(manifest)
    examples = Samples(data, manifest, samples, tokenizer=tokenizer)
    total = examples.count or samples
    observers = {
        name: Observer(bundle.file(part.file), -(-total // size), options.threads)
        for name, part in manifest.parts.items()
    }
    watch = DataWatch(manifest, str(data) if isinstance(data, (str, Path)) else ITERABLE)
    calls: list[Call] = []
    generator = np.random.default_rng(0)
    runs: dict[str, Run] = {name: observer.run for name, observer in observers.items()}
    for number, batch in enumerate(batches(examples.stream, size)):
        for example in {id(example): example for example in batch}.values():  # a short batch repeats its samples
            watch.see(example)
        if number % shard[1] == shard[0] - 1:
            call = run_parts(manifest, runs, stack(batch), generator)
            if number < KEPT:
                calls.append(call)
        else:
            skip_parts(manifest, size, generator)
            for observer in observers.values():
                observer.skip()
        report("calibrate", len(watch.digests), total)
    if not watch.digests:
        raise DataError(*NO_SAMPLES)
    statistics = {name: observer.statistics for name, observer in observers.items()}
    return Observation(statistics, watch.report(list(examples.notes.by_kind().values())), tuple(calls))
