# SPDX-License-Identifier: Apache-2.0
"""ONNX files of any exporter as models: read, converted to one opset, and run unchanged for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from perceiver_export.exporter.fold.nodes import Sizes, shape_of, stored_sizes
from perceiver_export.exporter.fold.normalize import Constants
from perceiver_export.exporter.simplify import is_random, plain_session
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError, UsageError, first_line
from perceiver_export.runtimes.runtime import Array

OPSET = 20
_LEAST, _MOST = 11, 25
_CONTROL = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_KINDS = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.INT32: np.int32,
    ir.DataType.INT64: np.int64,
    ir.DataType.UINT8: np.uint8,
    ir.DataType.BOOL: np.bool_,
}
_INDICES = (ir.DataType.INT32, ir.DataType.INT64)
_INTEGERS = (ir.DataType.UINT8, *_INDICES)


class OnnxFile:
    """An ONNX file as a model: {input: array} -> {output: array}.

    ``shape`` fixes dimensions that the file leaves open, by input, with or without the batch. ``examples``: random
    inputs of these shapes. Raises CheckpointError if the file is not ONNX or lacks its external data,
    UnsupportedModelError if it cannot be exported, UsageError if a dimension stays open.
    """

    def __init__(self, path: Path, shape: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.path = path
        model = self.model()
        refuse(model.graph)
        self.shapes = {str(value.name): _fixed(value, shape or {}) for value in model.graph.inputs}
        for name in shape or {}:
            if name not in self.shapes:
                raise UsageError(f"the model has no input {name!r}", f"use one of {', '.join(self.shapes)}")
        rng = np.random.default_rng(0)
        self.vocabularies = vocabularies(model.graph)
        self.examples = {
            str(value.name): _example(rng, value, self.shapes[str(value.name)], self.vocabularies)
            for value in model.graph.inputs
        }
        self.outputs = tuple(str(value.name) for value in model.graph.outputs)
        if not self.outputs:
            raise UnsupportedModelError("the model has no outputs", "export a model with at least one output")
        if twice := sorted({name for name in self.outputs if self.outputs.count(name) > 1}):
            raise UnsupportedModelError(f"outputs listed twice: {', '.join(twice)}", "list each output once")
        for name in self.shapes.keys() & set(self.outputs):
            raise UnsupportedModelError(f"{name!r} is both an input and an output", "remove that output")
        dims = [value.shape[0] for value in model.graph.inputs if value.shape]
        self.samples = next((size for size in dims if isinstance(size, int)), None)  # per call; None: any number

    def sizes(self) -> list[int]:
        """The shapes of the constants, and the shapes stored in constants."""
        graph = self.graph(self.shapes).graph
        own = [size for value in graph.initializers.values() for size in shape_of(value) or ()]
        return own + [size for node in graph for _, found in stored_sizes(node) for size in found]

    def model(self) -> ir.Model:
        """The graph in `OPSET` or newer, with functions inlined and weights in memory."""
        import onnx
        import onnx.inliner
        import onnx.version_converter

        try:
            proto = onnx.load(self.path)
        except Exception as error:  # protobuf, onnx and the file system each raise their own
            raise CheckpointError(
                f"{self.path} cannot be read as ONNX: {first_line(error)}",
                "copy it again, with its external data beside it",
            ) from error
        opset = next((one.version for one in proto.opset_import if one.domain in ("", "ai.onnx")), 0)
        if not _LEAST <= opset <= _MOST:
            raise UnsupportedModelError(
                f"{self.path} has opset {opset}; {_LEAST} to {_MOST} are supported", "export it again with opset 20"
            )
        attributes = (attribute for node in proto.graph.node for attribute in node.attribute)
        if proto.graph.sparse_initializer or any(one.HasField("sparse_tensor") for one in attributes):
            raise UnsupportedModelError(f"{self.path} has sparse weights", "store them dense")
        for value in (*proto.graph.input, *proto.graph.output):
            if value.type.WhichOneof("value") not in ("tensor_type", None):
                raise UnsupportedModelError(f"{value.name!r} is not a tensor", "take and return tensors only")
        try:
            if proto.functions:
                proto = onnx.inliner.inline_local_functions(proto)
            if opset < OPSET:
                proto = onnx.version_converter.convert_version(proto, OPSET)
            model = ir.from_proto(proto)
        except Exception as error:
            raise UnsupportedModelError(
                f"{self.path} cannot be converted from opset {opset} to {OPSET}: {type(error).__name__}",
                "export it again with opset 20",
            ) from error
        common.RemoveInitializersFromInputsPass()(model)
        for value in model.graph.inputs:
            if value.shape is not None:  # old exporters write -1 for an open dimension
                value.shape = ir.Shape([None if isinstance(dim, int) and dim < 0 else dim for dim in value.shape])
        return model

    def graph(self, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
        """The graph with inputs of these shapes; all other shapes are still unknown."""
        model = self.model()
        for value in model.graph.inputs:
            value.shape = ir.Shape(shapes[str(value.name)])
        for node in model.graph:
            for result in node.outputs:
                result.shape = None
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        return model

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the unchanged file on ONNX Runtime, without optimizations."""
        hint = "export it again"
        try:
            session, hint = plain_session(str(self.path)), f"give --shape NAME=SIZES that the model takes, or {hint}"
            found = session.run(list(self.outputs), dict(feeds))
            if not all(hasattr(one, "shape") for one in found):
                raise TypeError("an output is not a tensor")  # its type is missing in the file
            return dict(zip(self.outputs, found, strict=True))
        except Exception as error:  # onnxruntime has no class of its own for them
            raise UnsupportedModelError(
                f"ONNX Runtime cannot run {self.path}: {' '.join(str(error).split())}", hint
            ) from error

    def run_samples(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """`run` for any number of samples, in as many calls as a file with a fixed batch needs."""
        count = len(next(iter(feeds.values())))
        size = self.samples or count
        rows = [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]
        found = [self.run({name: array[some] for name, array in feeds.items()}) for some in rows]
        return {name: np.concatenate([one[name] for one in found])[:count] for name in self.outputs}


def refuse(graph: ir.Graph) -> None:
    """Raise UnsupportedModelError for nodes and inputs that not every engine supports."""
    for node in graph:
        where = f"node {node.name!r}" if node.name else "a node"
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedModelError(
                f"{where} is {node.op_type} of domain {node.domain!r}, not a standard operator",
                "export the model again without custom or contrib operators",
            )
        if node.op_type in _CONTROL:
            raise UnsupportedModelError(
                f"{where} is {node.op_type}: control flow depends on data", "export the model without it"
            )
        if is_random(node):
            raise UnsupportedModelError(
                f"{where} is {node.op_type}: it draws random numbers", "make the random numbers an input"
            )
    for value in graph.inputs:
        if value.dtype not in _KINDS:
            kind = "untyped" if value.dtype is None else value.dtype.name.lower()
            raise UnsupportedModelError(
                f"{value.name!r} is {kind}; float32, integers and bool are supported", "export the model in float32"
            )


def _fixed(value: ir.Value, shape: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of an input, with open dimensions as asked; an open first one defaults to one sample."""
    name, asked = str(value.name), shape.get(str(value.name))
    dims = None if value.shape is None else list(value.shape)
    if dims is None or (asked is not None and len(asked) not in (len(dims), len(dims) - 1)):
        if dims is None and asked is not None:
            return asked
        raise UsageError(
            f"input {name!r} has {'open' if dims is None else len(dims)} dimensions", f"give --shape {name}=SIZExSIZE…"
        )
    if asked is not None and len(asked) == len(dims) - 1:
        asked = (dims[0] if isinstance(dims[0], int) else 1, *asked)
    found: list[int] = []
    for axis, dim in enumerate(dims):
        known = dim if isinstance(dim, int) else None
        wanted = asked[axis] if asked is not None else known if known is not None else 1 if axis == 0 else None
        if wanted is None:
            raise UsageError(
                f"dimension {axis} of input {name!r} is open", f"fix it: --shape {name}=SIZExSIZE…, without the batch"
            )
        if known is not None and wanted != known:
            raise UsageError(f"dimension {axis} of input {name!r} is {known}, not {wanted}", "leave that --shape out")
        found.append(wanted)
    return tuple(found)


def vocabularies(graph: ir.Graph) -> dict[str, int]:
    """The number of rows of the table that an integer input indexes, by input."""
    constant, found = Constants(Sizes()), dict[str, int]()
    for node in graph:
        if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
            continue
        value = node.inputs[1]
        while value is not None and (maker := value.producer()) is not None and _keeps_integers(maker):
            value = maker.inputs[0]
        table = None if node.inputs[0] is None else constant(node.inputs[0])
        rows = 0 if table is None else len(table)
        if value is not None and value.is_graph_input() and value.dtype in _INTEGERS and rows:
            found[str(value.name)] = min(rows, found.get(str(value.name), rows))
    return found


def _keeps_integers(node: ir.Node) -> bool:
    """Whether a node leaves integers unchanged; a cast to a narrower type would wrap."""
    return node.op_type == "Identity" or (node.op_type == "Cast" and node.attributes.get_int("to", 0) in _INDICES)


def _example(rng: np.random.Generator, value: ir.Value, shape: tuple[int, ...], known: Mapping[str, int]) -> Array:
    assert value.dtype is not None
    kind = _KINDS[value.dtype]
    if kind is np.float32:
        return rng.standard_normal(shape, dtype=np.float32)
    most = known.get(str(value.name), 2)
    return rng.integers(0, most, shape).astype(kind)
