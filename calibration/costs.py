# SPDX-License-Identifier: Apache-2.0
"""FLOPs, parameters and bytes of a graph, stage by stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_ir as ir

from perceiver_export.runtimes.manifest import Stage

_NO_WORK = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Shape", "Constant"})
# FLOPs an output element of what is not a product; 1 for the rest, 0 for what only moves data.
_PER_ELEMENT = {"LayerNormalization": 8, "Softmax": 5, "Gelu": 10, "Erf": 8, "Tanh": 8, "Sqrt": 1}
_MOVES = frozenset({"Transpose", "Concat", "Expand", "Slice", "Gather", "Pad", "Split", "Cast"})


@dataclass
class _Total:
    flops: int = 0
    activation_bytes: int = 0
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)


def stage_costs(graph: ir.Graph) -> tuple[Stage, ...]:
    """Costs by stage (`input_adapter`, `encoder.cross_attention`, `encoder.self_attentions`, …) in order of running.

    FLOPs count a multiply-add as 2. A shared weight counts once in parameters and bytes, and in FLOPs as often as it
    is used. FLOPs and bytes of activations are divided by the batch, and a dynamic one counts as 1, so that the
    figures are for one sample. Bytes of activations are those that each node reads and writes, as if every node went
    to memory.
    """
    batch = _dims(graph.inputs[0])[0]
    totals: dict[str, _Total] = {}
    for node in graph:
        total = totals.setdefault(_stage(node.name or ""), _Total())
        total.flops += node_flops(node)
        if node.op_type not in _NO_WORK:
            total.activation_bytes += sum(
                _bytes(value) for value in (*node.inputs, *node.outputs) if _is_activation(value)
            )
        for value in node.inputs:
            weight = value.const_value if value is not None and value.is_initializer() else None
            if value is not None and value.name is not None and weight is not None and weight.dtype.is_floating_point():
                total.weights[value.name] = (weight.size, weight.nbytes)
    counted: set[str] = set()
    stages = []
    for name, total in totals.items():
        own = {weight: size for weight, size in total.weights.items() if weight not in counted}
        counted.update(own)
        parameters, weight_bytes = (sum(sizes) for sizes in zip(*own.values(), strict=True)) if own else (0, 0)
        if total.flops or parameters or total.activation_bytes:
            per_sample = total.flops // batch, total.activation_bytes // batch
            stages.append(Stage(name, per_sample[0], parameters, weight_bytes, per_sample[1]))
    return tuple(stages)


def node_flops(node: ir.Node) -> int:
    """FLOPs of one node."""
    elements = _elements(node.outputs[0])
    if node.op_type == "MatMul":
        return 2 * elements * _size(node.inputs[0], -1)
    if node.op_type == "Gemm":
        transposed = node.attributes.get_int("transA", 0)
        return 2 * elements * _size(node.inputs[0], 0 if transposed else 1)
    if node.op_type == "Conv":
        weight = node.inputs[1]
        return (
            2 * elements * math.prod(_size(weight, axis) for axis in range(1, len(weight.shape or ()) if weight else 0))
        )
    if node.op_type in ("MaxPool", "AveragePool"):
        return elements * math.prod(node.attributes.get_ints("kernel_shape", (1,)))
    if node.op_type in _NO_WORK or node.op_type in _MOVES:
        return 0
    return elements * _PER_ELEMENT.get(node.op_type, 1)


def _stage(node_name: str) -> str:
    """`encoder.self_attentions.0.attention/MatMul_3` -> `encoder.self_attentions`; the MLP and norms are within."""
    parts = node_name.split("/")[0].split(".")
    return ".".join(parts[:2]) if parts[0] in ("encoder", "decoder") and len(parts) > 1 else parts[0]


def _is_activation(value: ir.Value | None) -> bool:
    return value is not None and not value.is_initializer()


def _bytes(value: ir.Value | None) -> int:
    if value is None or value.dtype is None:
        return 0
    return int(_elements(value) * value.dtype.itemsize)


def _elements(value: ir.Value) -> int:
    return math.prod(_dims(value))


def _size(value: ir.Value | None, axis: int) -> int:
    dims = _dims(value) if value is not None else ()
    return dims[axis] if dims else 1


def _dims(value: ir.Value) -> tuple[int, ...]:
    shape = value.shape if value.shape is not None else ()
    return tuple(dim if isinstance(dim, int) else 1 for dim in shape)
