# SPDX-License-Identifier: Apache-2.0
"""One streaming pass over the data that collects everything for every scheme.

Reductions run inside the graph, so what leaves it is a few numbers a tensor and not the tensor: all tensors of one
ImageNet picture are 3.4 GB. They run right behind what they reduce, so that it need not be kept either. Bounds are
exact; the sample of rows is drawn at random positions, new ones in each call.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.activations import Activation, Hazard, Statistics
from perceiver_export.calibration.gemm import constant, split_gemms
from perceiver_export.calibration.linears import find_linears
from perceiver_export.calibration.sessions import open_session
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.runtime import Array, Feeds

_PLACES = "calibration.places"  # the extra input: which rows to sample, in [0, 1)
_VALUES_A_TENSOR = 1 << 17
_BYTES = 64 << 20  # for the samples of all tensors together
_SUMS = {"Softmax", "ReduceSum"}


class Observer:
    """A graph that is watched while it runs. ``statistics`` grow with each call.

    ``samples`` is how many calls there will be; it spreads the rows that are kept over all of them.
    """

    def __init__(self, path: Path, samples: int, seed: int = 0, threads: int | None = None) -> None:
        model = load_graph(path)
        activations = {linear.activation for linear in find_linears(model.graph)[0]}
        self._outputs = [value.name or "" for value in model.graph.outputs]
        self._widths = {str(value.name): _width(value) for value in activations}
        limit = min(_VALUES_A_TENSOR, _BYTES // 4 // max(1, len(activations)))
        capacity = {name: max(1, limit // width) for name, width in self._widths.items()}
        self._rows = max((-(-rows // max(1, samples)) for rows in capacity.values()), default=1)
        rows = {name: -(-kept // max(1, samples)) for name, kept in capacity.items()}
        self._hazards = _watch(model.graph, sorted(activations, key=lambda value: str(value.name)), rows)
        self._session = open_session(model, path.parent, threads, in_order=True)
        self._takes_places = bool(activations)
        self._generator = np.random.default_rng(seed)
        self.statistics = Statistics(
            {name: Activation.empty(width, capacity[name]) for name, width in self._widths.items()}
        )

    def run(self, feeds: Feeds, count: bool = True) -> dict[str, Array]:
        """Run one call, and give the graph's own outputs; without ``count`` nothing is taken note of.

        Raises DataError where a value is NaN or infinite.
        """
        given = dict(feeds)
        if self._takes_places:
            given[_PLACES] = self._generator.random(self._rows, np.float32)
        names = [output.name for output in self._session.get_outputs()]
        values = dict(zip(names, self._session.run(None, given), strict=True))
        if count:
            self._count(values)
        return {name: values[name] for name in self._outputs}

    def _count(self, values: dict[str, Array]) -> None:
        # Bounds alone would not show a NaN: onnxruntime's ReduceMax passes over it, except in the first row.
        for name in self._outputs:
            _require_finite(name, values[name])
        for name, activation in self.statistics.activations.items():
            low, high, rows = (values[f"{name}.{what}"] for what in ("low", "high", "rows"))
            _require_finite(name, low, high, rows)
            activation.add(low, high, rows, self._generator)
        for name, depth in self._hazards.items():
            largest = max(-float(values[f"{name}.least"]), float(values[f"{name}.most"]))
            before = self.statistics.hazards.get(name)
            self.statistics.hazards[name] = Hazard(max(largest, before.largest if before else 0.0), depth)
        self.statistics.calls += 1


def _require_finite(name: str, *arrays: Array) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise DataError(
            f"the model gives NaN or infinite values in {name}", "look for them in the data, or in the checkpoint"
        )


def load_graph(path: Path) -> ir.Model:
    """A bundle's graph with its shapes, and MatMul as the one kind of linear."""
    import onnx_ir.passes.common as common

    model = ir.load(path)
    if any(value.shape is None for node in model.graph for value in node.outputs):
        common.ShapeInferencePass()(model)
    split_gemms(model.graph)
    return model


def _watch(graph: ir.Graph, activations: list[ir.Value], rows: dict[str, int]) -> dict[str, int]:
    """Add outputs for bounds and rows of the activations and for hazards; give the hazards' depths by name."""
    hazards = {value: depth for node in graph for value, depth in _hazardous(node)}
    scalars = constant(graph, "calibration.flat", np.array([-1], np.int64))
    if activations:
        places = ir.Value(name=_PLACES, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None]))
        graph.inputs.append(places)
    for value in activations:
        width, behind = _width(value), _Behind(graph, value)
        flat = constant(graph, f"calibration.rows_of_{width}", np.array([-1, width], np.int64))
        matrix = behind.add("Reshape", [value, flat], "matrix")
        axis = constant(graph, "calibration.first", np.array([0], np.int64))
        behind.output("ReduceMin", [matrix, axis], "low", keepdims=0)
        behind.output("ReduceMax", [matrix, axis], "high", keepdims=0)
        _sample_rows(behind, matrix, places, rows[str(value.name)])
    for value in hazards:
        behind = _Behind(graph, value)
        flat_value = behind.add("Reshape", [value, scalars], "flat")
        behind.output("ReduceMin", [flat_value], "least", keepdims=0)
        behind.output("ReduceMax", [flat_value], "most", keepdims=0)
    return {str(value.name): depth for value, depth in hazards.items()}


class _Behind:
    """Puts nodes right behind what makes a value, before the graph goes on."""

    def __init__(self, graph: ir.Graph, value: ir.Value) -> None:
        self.graph, self._name, self._last = graph, value.name, value.producer()

    def add(self, op: str, inputs: list[ir.Value], what: str, **attributes: int) -> ir.Value:
        """A node, whose output is called after the value."""
        made = ir.Value(name=f"{self._name}.{what}")
        node = ir.node(op, inputs, attributes, outputs=[made], name=made.name)
        if self._last is None:  # an input of the graph
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(self._last, node)
        self._last = node
        return made

    def output(self, op: str, inputs: list[ir.Value], what: str, **attributes: int) -> None:
        """A node, whose output leaves the graph."""
        self.graph.outputs.append(self.add(op, inputs, what, **attributes))

    def constant(self, what: str, array: Array) -> ir.Value:
        """An initializer, called after the value."""
        return constant(self.graph, f"{self._name}.{what}", array)


def _sample_rows(behind: _Behind, matrix: ir.Value, places: ir.Value, count: int) -> None:
    """rows = matrix[floor(places[:count] × number of rows)]; the number may be dynamic, so it is taken in the graph."""
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
    """Tensors of a node that fp16 may not hold, with how many terms were summed."""
    output = node.outputs[0]
    if output.dtype != ir.DataType.FLOAT:
        return []
    if node.op_type in ("MatMul", "Conv", "Pow", "Add"):
        depth = _width(node.inputs[0]) if node.op_type == "MatMul" else 1
        return [(output, depth)]
    if node.op_type in _SUMS and node.inputs[0] is not None:
        return [(node.inputs[0], _width(node.inputs[0]))]
    return []


def _width(value: ir.Value | None) -> int:
    """The size of the last axis."""
    last = value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else 1
    return last if isinstance(last, int) else 1
