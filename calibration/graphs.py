# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs that are being worked on: values, rewriting, files, costs, and ONNX Runtime sessions on them."""

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
from typing import Any

import numpy as np
import onnx_ir as ir

from perceiver_export.runtimes.engines.ort import utf8
from perceiver_export.runtimes.errors import BundleError, ExportError, require
from perceiver_export.runtimes.external_data import external_files
from perceiver_export.runtimes.manifest import Stage
from perceiver_export.runtimes.runtime import Array

WEIGHTS = "model.weights"
SMALLEST = 256  # bytes; smaller arrays stay in the graph
# Operators that only move numbers.
MOVES = frozenset(
    {
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Expand", "Pad", "Gather"),
        *("GatherND", "CastLike", "Identity", "Flatten"),
    }
)


def dims(value: ir.Value | None) -> tuple[int, ...]:
    """The shape, a dynamic size counted as 1; empty where there is no shape."""
    shape = value.shape if value is not None and value.shape is not None else ()
    return tuple(dim if isinstance(dim, int) else 1 for dim in shape)


def array_of(value: ir.Value) -> Array:
    """An initializer's numbers."""
    assert value.const_value is not None
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer."""
    return value is not None and value.is_initializer() and value.const_value is not None


def sqnr(exact: Array, found: Array) -> float:
    """Signal to quantization noise in dB: 10 log10(Σ exact² / Σ (found − exact)²), see `decibels`."""
    exact = exact.astype(np.float64)
    return decibels(float(np.square(exact).sum()), float(np.square(found - exact).sum()))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), at most 200, which stands for no noise; −200 where the noise is not finite.

    Both ends are numbers because JSON and the order of layers need numbers.
    """
    if not np.isfinite(noise):
        return -200.0
    return 200.0 if noise == 0.0 else min(200.0, float(10 * np.log10(max(signal, 1e-300) / noise)))


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is of this type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def reached(
    start: Iterable[ir.Value | None], passes: Callable[[ir.Node], bool], forward: bool = False
) -> dict[ir.Node, bool]:
    """The nodes that a walk from ``start`` to inputs (or outputs) meets, and whether it ``passes`` them."""
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
    """Whether a walk from ``start`` over nodes of the types ``through`` meets a node of a type in ``goal``."""
    return any(node.op_type in goal for node in reached(start, lambda node: node.op_type in through, forward))


def constant(graph: ir.Graph, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
    """An initializer of that name; where the name is taken by another array, of a name like it."""
    unique, count = name, 1
    while (known := graph.initializers.get(unique)) is not None:
        same = array_of(known)
        if same.dtype == array.dtype and np.array_equal(same, array):
            return known
        count += 1
        unique = f"{name}.{count}"
    tensor = ir.tensor(array, dtype=dtype, name=unique)
    shape = ir.Shape(array.shape)
    value = ir.Value(name=unique, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape)
    graph.register_initializer(value)
    return value


def remove_unused(graph: ir.Graph) -> None:
    """Drop the initializers that no node reads."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


class Behind:
    """Puts nodes right behind the node that makes a value, each behind the one before.

    At the end of the graph they would keep the value alive until then.
    """

    def __init__(self, graph: ir.Graph, value: ir.Value) -> None:
        self.graph, self._name, self._last = graph, value.name, value.producer()

    def add(self, op: str, inputs: list[ir.Value], what: str, **attributes: int) -> ir.Value:
        """A node; its output is named after the value and ``what``."""
        made = ir.Value(name=f"{self._name}.{what}")
        node = ir.node(op, inputs, attributes, outputs=[made], name=made.name)
        if self._last is None:  # an input of the graph
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(self._last, node)
        self._last = node
        return made

    def output(self, op: str, inputs: list[ir.Value], what: str, **attributes: int) -> None:
        """A node whose output leaves the graph."""
        self.graph.outputs.append(self.add(op, inputs, what, **attributes))

    def constant(self, what: str, array: Array) -> ir.Value:
        """An initializer, named after the value and ``what``."""
        return constant(self.graph, f"{self._name}.{what}", array)


def split_gemms(graph: ir.Graph) -> None:
    """Rewrite in place every Gemm of constants as MatMul and Add, so that there is one kind of linear layer.

    Given:  y = Gemm<transB = 1, alpha = a, beta = b>(x, W, c)
    Result: y = Add(MatMul(x, a Wᵀ), b c)
    """
    rewritten: dict[tuple[ir.Value, float, int], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Gemm" or node.attributes.get_int("transA", 0) != 0:
            continue
        x, weight, bias = (*node.inputs, None)[:3]
        if weight is None or not is_constant(weight) or (bias is not None and not is_constant(bias)):
            continue
        alpha, transposed = node.attributes.get_float("alpha", 1.0), node.attributes.get_int("transB", 0)
        key = (weight, alpha, transposed)
        if key not in rewritten:
            array = array_of(weight).T if transposed else array_of(weight)
            rewritten[key] = constant(graph, f"{weight.name}.matmul", np.ascontiguousarray(array * np.float32(alpha)))
        output, beta = node.outputs[0], node.attributes.get_float("beta", 1.0)
        made = ir.Value(name=f"{output.name}.matmul", type=output.type, shape=output.shape)
        nodes = [ir.node("MatMul", [x, rewritten[key]], name=f"{node.name}.matmul", outputs=[made])]
        if bias is not None:
            if beta != 1.0:
                bias = constant(graph, f"{bias.name}.scaled", array_of(bias) * np.float32(beta))
            nodes.append(ir.node("Add", [made, bias], name=f"{node.name}.add"))
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], nodes[-1].outputs)
    remove_unused(graph)


def read_graph(path: Path) -> ir.Model:
    """An ONNX file. Raises BundleError: it is damaged, is no ONNX, or names weights outside its directory."""
    for name in external_files(path):
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise BundleError(f"{path} reads weights from {name!r}", "do not trust this file")
    try:
        return ir.load(path)
    except Exception as error:  # protobuf and onnx-ir each have their own for a damaged file
        raise BundleError(f"{path} is not an ONNX model that can be read", "copy or export it again") from error


def save_graphs(models: Mapping[str, ir.Model], directory: Path) -> None:
    """Write each graph under its file name, and one model.weights in which each distinct array is stored once.

    Weights lie outside the graphs: an engine then maps them instead of holding them twice.
    """
    store_weights([value for model in models.values() for value in model.graph.initializers.values()], directory)
    for file, model in models.items():
        model.producer_name = "perceiver-export"
        model.producer_version = importlib.metadata.version("perceiver-export")
        ir.save(model, directory / file)


def store_weights(values: Iterable[ir.Value], directory: Path, file: str = WEIGHTS, name: str = WEIGHTS) -> None:
    """Move the large arrays of ``values`` into a file, each distinct array once; graphs will call the file ``name``.

    Raises OSError where the disk is full.
    """
    stored: dict[str, ir.TensorProtocol] = {}
    places: list[tuple[ir.Value, str]] = []
    for value in values:
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= SMALLEST:
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


# Neither compute nor move anything: an engine runs nothing for them.
_NO_WORK = frozenset(
    {
        *("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Shape", "Constant"),
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
# FLOPs an output element of operators that are no products; 1 for operators not listed.
_PER_ELEMENT = {"LayerNormalization": 8, "Softmax": 5, "Gelu": 10, "Erf": 8, "Tanh": 8}
_PER_ELEMENT |= dict.fromkeys((_NO_WORK | MOVES | {"Cast"}) - {"GatherND", "CastLike"}, 0)


def stage_costs(graph: ir.Graph) -> tuple[Stage, ...]:
    """Costs by stage (`input_adapter`, `encoder.cross_attention`, `encoder.self_attentions`, …) in running order.

    FLOPs count a multiply-add as 2. A shared weight counts once in parameters and bytes, and in FLOPs at each use.
    FLOPs and activation bytes are for one sample: they are divided by the batch, and a dynamic batch counts as 1.
    Activation bytes are what every node reads and writes, as if every node went to memory.
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
    """Weights are floats or quantized; shapes and indices are not."""
    return dtype.is_floating_point() or dtype in (ir.DataType.INT8, ir.DataType.INT4)


def node_flops(node: ir.Node) -> int:
    """FLOPs of one node, a dynamic size counted as 1."""
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
    """`encoder.self_attentions.0.attention/MatMul_3` -> `encoder.self_attentions`; MLPs and norms are part of it."""
    parts = node_name.split("/")[0].split(".")
    return ".".join(parts[:2]) if parts[0] in ("encoder", "decoder") and len(parts) > 1 else parts[0]


def _bytes(value: ir.Value) -> int:
    return 0 if value.dtype is None else int(math.prod(dims(value)) * value.dtype.itemsize)


_SILENT = 4
_TYPED_OPSET = 21  # the first in which QuantizeLinear has `output_dtype`


def open_session(
    model: ir.Model,
    folder: Path,
    threads: int | None = None,
    config: Mapping[str, Any] | None = None,
    in_order: bool = False,
) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU; external weights are read from ``folder``.

    ``in_order`` runs nodes in the graph's order and allocates memory as it goes, which takes less of it. By default
    onnxruntime keeps room for all tensors of a call from the second call on. ``config``: session options by name, those
    without a dot are attributes of SessionOptions.

    Raises BundleError where onnxruntime refuses the graph, ExportError where it cannot write a file that ``config``
    asks for, MissingDependencyError.
    """
    onnxruntime = require("onnxruntime", "calibration", "pip install 'perceiver-export[quantize]'")
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
    # onnxruntime 1.32 makes uint8 of int8 activations but leaves `output_dtype` as it was, and then refuses the graph.
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
            raise ExportError(
                f"the disk of the temporary directory {tempfile.gettempdir()} is full",
                "free some space there, or name another directory with TMPDIR",
            ) from error
        raise BundleError(f"onnxruntime refuses the graph: {first_line}", "report it with the bundle") from error


def run_session(session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of an ONNX Runtime session by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
