# SPDX-License-Identifier: Apache-2.0
"""The canonical form of a quantized graph, which ONNX Runtime, OpenVINO and TensorRT's parser all read.

Weights are int8 (K, N), one initializer and one DequantizeLinear for each distinct one, however many products read it.
Activations are int8 with one scale and zero point 0 for a tensor, one Q/DQ pair however many products read it. Biases
stay float, and outputs are not quantized: an int32 bias is refused by TensorRT, and an output Q costs accuracy for
nothing. int4 weights have a scale for each block of inputs, which needs opset 21.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.gemm import constant, remove_unused
from perceiver_export.calibration.linears import Linear
from perceiver_export.calibration.weights import IntegerWeight
from perceiver_export.runtimes.runtime import Array

_INT4_OPSET = 21


@dataclass(frozen=True)
class LinearPlan:
    """How one run of a linear is written; ``scale`` None leaves its activation float, ``bias`` None its bias as it is."""

    linear: Linear
    weight: IntegerWeight
    scale: float | None
    bias: Array | None = None


def write_qdq(model: ir.Model, plans: Iterable[LinearPlan]) -> None:
    """Rewrite the graph in place. Runs of one weight must have equal `LinearPlan.weight`.

    Given:  y = Add(MatMul(x, W), b)
    Result: y = Add(MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear<axis = 1>(W8)), b)
    """
    graph = model.graph
    weights: dict[ir.Value, ir.Value] = {}
    activations: dict[tuple[ir.Value, float], ir.Value] = {}
    for plan in plans:
        linear = plan.linear
        if linear.weight not in weights:
            weights[linear.weight] = _weight(model, linear, plan.weight)
        if plan.scale is not None:
            key = (linear.activation, plan.scale)
            if key not in activations:
                activations[key] = _activation(graph, linear, plan.scale)
            linear.node.replace_input_with(0, activations[key])
        linear.node.replace_input_with(1, weights[linear.weight])
        if plan.bias is not None and linear.bias_add is not None and linear.bias is not None:
            index = list(linear.bias_add.inputs).index(linear.bias)
            corrected = constant(graph, f"{linear.bias.name}.corrected", plan.bias.astype(np.float32))
            linear.bias_add.replace_input_with(index, corrected)
    remove_unused(graph)


def _activation(graph: ir.Graph, linear: Linear, scale: float) -> ir.Value:
    """x -> DQ(Q(x)), both next to the first product that reads it."""
    x = linear.activation
    scalar = constant(graph, f"{x.name}.scale", np.float32(scale).reshape(()))
    zero = constant(graph, f"{x.name}.zero_point", np.zeros((), np.int8))
    stage = _stage(linear)
    codes = ir.Value(name=f"{x.name}.int8", type=ir.TensorType(ir.DataType.INT8), shape=x.shape)
    restored = ir.Value(name=f"{x.name}.dequantized", type=x.type, shape=x.shape)
    quantize = ir.node("QuantizeLinear", [x, scalar, zero], name=f"{stage}/Quantize {x.name}", outputs=[codes])
    dequantize = ir.node(
        "DequantizeLinear", [codes, scalar, zero], name=f"{stage}/Dequantize {x.name}", outputs=[restored]
    )
    graph.insert_before(linear.node, [quantize, dequantize])
    return restored


def _weight(model: ir.Model, linear: Linear, weight: IntegerWeight) -> ir.Value:
    """The one DQ of a weight, before the first product that reads it."""
    graph, name = model.graph, linear.weight.name
    dtype = ir.DataType.INT4 if weight.bits == 4 else ir.DataType.INT8
    values = constant(graph, f"{name}.int{4 if weight.bits == 4 else 8}", _packed(weight, dtype), dtype)
    scales = constant(graph, f"{name}.scales", weight.scales)
    zero = constant(graph, f"{name}.zero_points", _packed_zeros(weight, dtype), dtype)
    attributes: dict[str, int] = {"axis": weight.values.ndim - 1}
    if weight.block is not None:
        attributes = {"axis": 0, "block_size": weight.block}
        model.opset_imports[""] = max(_INT4_OPSET, model.opset_imports.get("", 0))
    restored = ir.Value(name=f"{name}.dequantized", type=linear.weight.type, shape=linear.weight.shape)
    node = ir.node(
        "DequantizeLinear",
        [values, scales, zero],
        attributes,
        name=f"{_stage(linear)}/Dequantize {name}",
        outputs=[restored],
    )
    graph.insert_before(linear.node, node)
    return restored


def _packed(weight: IntegerWeight, dtype: ir.DataType) -> Array:
    import ml_dtypes

    return weight.values.astype(ml_dtypes.int4) if dtype == ir.DataType.INT4 else weight.values


def _packed_zeros(weight: IntegerWeight, dtype: ir.DataType) -> Array:
    import ml_dtypes

    return np.zeros(weight.scales.shape, ml_dtypes.int4 if dtype == ir.DataType.INT4 else np.int8)


def _stage(linear: Linear) -> str:
    """The module part of the node's name: what costs are counted by."""
    return linear.name.split("/")[0]


def activation_scales(plans: Mapping[str, LinearPlan]) -> dict[str, float]:
    """Scale of each quantized activation by the tensor's name."""
    return {
        str(plan.linear.activation.name): plan.scale for plan in plans.values() if plan.scale is not None
    }
