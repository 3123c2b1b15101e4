# SPDX-License-Identifier: Apache-2.0
"""Work with ONNX graphs: values, rewriting, files, costs, and ONNX Runtime sessions."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir

from perceiver_export.runtimes.engines.ort import utf8
from perceiver_export.runtimes.errors import BundleError, ExportError, require
from perceiver_export.runtimes.external_data import external_files
from perceiver_export.runtimes.manifest import Stage
from perceiver_export.runtimes.runtime import Array

WEIGHTS = "model.weights"
_SMALLEST = 256  # bytes; smaller arrays stay in the graph
PRODUCTS = ("MatMul", "Gemm", "Conv")
# Operators that only move values.
MOVES = frozenset(
    {
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Expand", "Pad", "Gather"),
        *("GatherND", "CastLike", "Identity", "Flatten"),
    }
)


def dims(value: ir.Value | None) -> tuple[int, ...]:
    """The shape, with dynamic sizes as 1; empty if the shape is unknown."""
    shape = value.shape if value is not None and value.shape is not None else ()
    return tuple(dim if isinstance(dim, int) else 1 for dim in shape)


def set_sizes(graph: ir.Graph, feeds: Mapping[str, Array]) -> None:
    """Replace dynamic dimensions (`batch`, `4*batch`) in all shapes by the sizes of ``feeds``."""
    sizes: dict[str, int] = {}
    for value in graph.inputs:
        name = str(value.name)
        if name in feeds and value.shape is not None:
            sizes |= zip(map(str, value.shape), feeds[name].shape, strict=True)
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_size(dim, sizes) for dim in value.shape])


def _size(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | ir.SymbolicDim:
    factor, _, name = str(dim).rpartition("*")
    return dim if isinstance(dim, int) or name not in sizes else int(factor or 1) * sizes[name]


def array_of(value: ir.Value) -> Array:
    """The array of an initializer."""
    assert value.const_value is not None
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> TypeGuard[ir.Value]:
    """Whether a value is an initializer."""
    return value is not None and value.is_initializer() and value.const_value is not None


def sqnr(exact: Array, found: Array) -> float:
    """The signal-to-quantization-noise ratio in dB: 10 log10(Σ exact² / Σ (found − exact)²). See `decibels`."""
    exact = exact.astype(np.float64)
    return decibels(float(np.square(exact).sum()), float(np.square(found - exact).sum()))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), at most 200, which stands for no noise; −200 if the noise is not finite.

    Both limits are finite because JSON and the sorting of layers need finite numbers.
    """
    if not np.isfinite(noise):
        return -200.0
    return 200.0 if noise == 0.0 else min(200.0, float(10 * np.log10(max(signal, 1e-300) / noise)))


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that produces a value, if it is of one of these types."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def reached(
    start: Iterable[ir.Value | None], passes: Callable[[ir.Node], bool], forward: bool = False
) -> dict[ir.Node, bool]:
    """The nodes met on a walk from ``start`` to inputs (or outputs), each with whether the walk ``passes`` it."""
    waiting, seen, found = list(start), set[ir.Value](), dict[ir.Node, bool]()
    while waiting:
        value = waiting.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        for node in value.consumers() if forward else [value.producer()]:
            if node is not None and node not in found:
                found[node] = passes(node)
                if found[node]:
                    waiting += node.outputs if forward else node.inputs
    return found


def leads_to(
    start: Iterable[ir.Value | None], through: frozenset[str], goal: frozenset[str], forward: bool = False
) -> bool:
    """Whether a walk from ``start`` through nodes of the types ``through`` meets a node of a type in ``goal``."""
    return any(node.op_type in goal for node in reached(start, lambda node: node.op_type in through, forward))


def constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """An initializer with that name, or with a number added if the name belongs to another array."""
    unique, count = name, 1
    while (known := graph.initializers.get(unique)) is not None:
        same = array_of(known)
        if same.dtype == array.dtype and np.array_equal(same, array):
            return known
        count += 1
        unique = f"{name}.{count}"
    value = ir.val(unique, const_value=ir.tensor(array, name=unique))
    graph.register_initializer(value)
    return value


def remove_unused(graph: ir.Graph) -> None:
    """Remove the initializers that no node reads."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


class Behind:
    """Inserts nodes directly after the node that produces a value, one after the other.

    At the end of the graph, they would keep the value alive for the whole run.
    """

    def __init__(self, graph: ir.Graph, value: ir.Value) -> None:
        self.graph, self._name, self._last = graph, value.name, value.producer()

    def add(self, op: str, inputs: list[ir.Value], what: str, **attributes: int) -> ir.Value:
        """Add a node. Its output is named after the value and ``what``."""
        made = ir.Value(name=f"{self._name}.{what}")
        node = ir.node(op, inputs, attributes, outputs=[made], name=made.name)
        if self._last is None:  # an input of the graph
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(self._last, node)
        self._last = node
        return made

    def output(self, op: str, inputs: list[ir.Value], what: str, **attributes: int) -> None:
        """Add a node whose output becomes an output of the graph."""
        self.graph.outputs.append(self.add(op, inputs, what, **attributes))

    def constant(self, what: str, array: Array) -> ir.Value:
        """Add an initializer named after the value and ``what``."""
        return constant(self.graph, f"{self._name}.{what}", array)


def split_gemms(graph: ir.Graph) -> None:
    """Rewrite every Gemm with constants as MatMul and Add, in place, so that linear layers have a single form.

    Given:  y = Gemm<transB = 1, alpha = a, beta = b>(x, W, c)
    Result: y = Add(MatMul(x, a Wᵀ), b c)
    """
    for node in list(graph):
        if node.op_type != "Gemm" or node.attributes.get_int("transA", 0) != 0:
            continue
        x, weight, bias = (*node.inputs, None)[:3]
        if weight is None or not is_constant(weight) or (bias is not None and not is_constant(bias)):
            continue
        alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
        array = array_of(weight).T if node.attributes.get_int("transB", 0) else array_of(weight)
        matrix = constant(graph, f"{weight.name}.matmul", np.ascontiguousarray(array * np.float32(alpha)))
        output = node.outputs[0]
        made = ir.Value(name=f"{output.name}.matmul", type=output.type, shape=output.shape)
        nodes = [ir.node("MatMul", [x, matrix], name=f"{node.name}.matmul", outputs=[made])]
        if bias is not None:
            if beta != 1.0:
                bias = constant(graph, f"{bias.name}.scaled", array_of(bias) * np.float32(beta))
            nodes.append(ir.node("Add", [made, bias], name=f"{node.name}.add"))
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], nodes[-1].outputs)
    remove_unused(graph)


def read_graph(path: Path) -> ir.Model:
    """Read an ONNX file. Raises BundleError if it is damaged, not ONNX, or has weights outside its directory."""
    for name in external_files(path):
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise BundleError(f"{path} reads weights from {name!r}", "do not trust this file")
    try:
        return ir.load(path)
    except Exception as error:  # protobuf and onnx-ir raise different exceptions for a damaged file
        raise BundleError(f"{path} is not a readable ONNX model", "copy or export it again") from error


def load_graph(path: Path) -> ir.Model:
    """A bundle's graph with shapes, and with MatMul as the only form of linear layers."""
    model = with_shapes(read_graph(path))
    split_gemms(model.graph)
    return model


def with_shapes(model: ir.Model) -> ir.Model:
    """The model itself, with missing shapes inferred."""
    import onnx_ir.passes.common as common

    if any(value.shape is None for node in model.graph for value in node.outputs):
        common.ShapeInferencePass()(model)
    return model


def save_graphs(models: Mapping[str, ir.Model], directory: Path) -> None:
    """Write each graph under its file name, and one model.weights in which each distinct array is stored once.

    Weights are stored outside the graphs, so that an engine maps them instead of holding them twice.
    """
    store_weights([value for model in models.values() for value in model.graph.initializers.values()], directory)
    for file, model in models.items():
        model.producer_name = "perceiver-export"
        model.producer_version = importlib.metadata.version("perceiver-export")
        ir.save(model, directory / file)


def is_large(tensor: ir.TensorProtocol | None) -> TypeGuard[ir.TensorProtocol]:
    """Whether an initializer's array is stored outside the graph."""
    return tensor is not None and tensor.nbytes >= _SMALLEST


def store_weights(values: Iterable[ir.Value], directory: Path, file: str = WEIGHTS, name: str = WEIGHTS) -> None:
    """Move the large arrays of ``values`` into a file, each distinct array once. Graphs refer to the file as ``name``.

    Raises OSError if the disk is full.
    """
    stored: dict[str, ir.TensorProtocol] = {}
    places: list[tuple[ir.Value, str]] = []
    for value in values:
        if is_large(tensor := value.const_value):
            digest = hashlib.sha256(f"{tensor.dtype}{tensor.shape}".encode() + tensor.tobytes()).hexdigest()
            stored.setdefault(digest, tensor)
            places.append((value, digest))
    external = ir.external_data.convert_tensors_to_external(list(stored.values()), directory, file)
    ends = [(one.offset or 0) + (one.length or 0) for one in external]
    if ends and (directory / file).stat().st_size < max(ends):  # onnx-ir does not notice a disk that fills up
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    by_digest = dict(zip(stored, external, strict=True))
    for value, digest in places:
        one = by_digest[digest]
        value.const_value = ir.ExternalTensor(
            name, one.offset, one.length, one.dtype, shape=one.shape, name=value.name or "", base_dir=directory
        )


# Operators for which an engine runs nothing: they neither compute nor move values.
_NO_WORK = frozenset(
    {
        *("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Shape", "Constant"),
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
# FLOPs per output element of operators other than products; 1 for operators not listed.
_PER_ELEMENT = {"LayerNormalization": 8, "Softmax": 5, "Gelu": 10, "Erf": 8, "Tanh": 8}
_PER_ELEMENT |= dict.fromkeys((_NO_WORK | MOVES | {"Cast"}) - {"GatherND", "CastLike"}, 0)


def stage_costs(graph: ir.Graph) -> tuple[Stage, ...]:
    """Costs by stage (`input_adapter`, `encoder.cross_attention`, `encoder.self_attentions`, …) in execution order.

    A multiply-add counts as 2 FLOPs. A shared weight counts once in parameters and bytes, and at each use in FLOPs.
    FLOPs and activation bytes are for one sample: they are divided by the batch, where a dynamic batch counts as 1.
    Activation bytes are counted as if every node read its inputs from memory and wrote its outputs to memory.
    """
    batch = dims(graph.inputs[0])[0]
    totals: dict[str, Counter[str]] = {}
    counted = set[ir.Value]()
    for node in graph:
        total = totals.setdefault(_stage(node.name or ""), Counter())
        total["flops"] += node_flops(node)
        for value in filter(None, (*node.inputs, *node.outputs)):
            weight = value.const_value
            if not value.is_initializer():
                total["activation_bytes"] += _bytes(value) if node.op_type not in _NO_WORK else 0
            elif weight is not None and _is_weight(weight.dtype) and value not in counted:
                counted.add(value)
                total["parameters"] += weight.size
                total["weight_bytes"] += weight.nbytes
    return tuple(
        Stage(
            *(name, total["flops"] // batch),
            *(total["parameters"], total["weight_bytes"], total["activation_bytes"] // batch),
        )
        for name, total in totals.items()
        if total["flops"] or total["parameters"] or total["activation_bytes"]
    )


def _is_weight(dtype: ir.DataType) -> bool:
    """Whether a constant of this type is a weight (float or quantized) and not a shape or index."""
    return dtype.is_floating_point() or dtype in (ir.DataType.INT8, ir.DataType.INT4)


def node_flops(node: ir.Node) -> int:
    """FLOPs of one node, with dynamic sizes as 1."""
    elements = math.prod(dims(node.outputs[0]))
    if node.op_type == "MatMul":
        return 2 * elements * math.prod(dims(node.inputs[0])[-1:])
    if node.op_type == "Gemm":
        depth = 0 if node.attributes.get_int("transA", 0) else 1
        return 2 * elements * math.prod(dims(node.inputs[0])[depth : depth + 1])
    if node.op_type == "Conv":
        return 2 * elements * math.prod(dims(node.inputs[1])[1:])
    if node.op_type in ("MaxPool", "AveragePool"):
        return elements * math.prod(node.attributes.get_ints("kernel_shape", (1,)))
    return elements * _PER_ELEMENT.get(node.op_type, 1)


def _stage(node_name: str) -> str:
    """`encoder.self_attentions.0.attention/MatMul_3` -> `encoder.self_attentions`, which includes MLPs and norms."""
    parts = node_name.split("/")[0].split(".")
    return ".".join(parts[:2]) if parts[0] in ("encoder", "decoder") and len(parts) > 1 else parts[0]


def _bytes(value: ir.Value) -> int:
    return 0 if value.dtype is None else int(math.prod(dims(value)) * value.dtype.itemsize)


_SILENT = 4
_TYPED_OPSET = 21  # the first opset in which QuantizeLinear has `output_dtype`


def open_session(
    model: ir.Model,
    folder: Path,
    threads: int | None = None,
    config: Mapping[str, Any] | None = None,
    in_order: bool = False,
) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU that reads external weights from ``folder``.

    ``in_order`` runs nodes in the graph's order and allocates memory on demand, which needs less memory: by default,
    from the second call on, onnxruntime reserves memory for all tensors of a call. ``config`` has session options by
    name; names without a dot are attributes of SessionOptions.

    Raises BundleError if onnxruntime rejects the graph, ExportError if it cannot write a file that ``config`` requests,
    and MissingDependencyError.
    """
    onnxruntime = require("onnxruntime", "calibration", "quantize")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    if in_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False
    for name, value in (config or {}).items():
        if "." in name:
            options.add_session_config_entry(name, value)
        else:
            setattr(options, name, value)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", utf8(folder))
    # onnxruntime 1.32 changes int8 activations to uint8 but leaves `output_dtype` unchanged, then rejects the graph.
    broken = ["QDQS8ToU8Transformer"] if model.opset_imports.get("", 0) >= _TYPED_OPSET else []
    try:
        return onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=broken
        )
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime") and not isinstance(error, UnicodeDecodeError):
            raise
        first_line = str(error).splitlines()[0]
        if "Failed to write" in first_line:
            said = f"the disk of the temporary directory {tempfile.gettempdir()} is full"
            raise ExportError(said, "free space there, or name another directory with TMPDIR") from error
        raise BundleError(f"onnxruntime rejects the graph: {first_line}", "report it with the bundle") from error


def run_session(session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of an ONNX Runtime session by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def run_graph(model: ir.Model, folder: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of one run on ONNX Runtime by name; see `open_session`."""
    return run_session(open_session(model, folder, in_order=True), feeds)
