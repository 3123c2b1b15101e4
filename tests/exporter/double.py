# SPDX-License-Identifier: Apache-2.0
"""Graphs in float64, where rounding hides nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def doubled(array: np.ndarray) -> np.ndarray:
    """float32 as float64, anything else as it is."""
    return array.astype(np.float64) if array.dtype == np.float32 else array


def in_double(model: ir.Model) -> None:
    """All float32 of a graph as float64, in place."""
    single, double = ir.DataType.FLOAT, ir.DataType.DOUBLE
    for value in list(model.graph.initializers.values()):
        if value.dtype == single and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float64), name=value.name)
            value.type = ir.TensorType(double)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == int(single):
            node.attributes["to"] = ir.AttrInt64("to", int(double))
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            own = node.attributes["value"].as_tensor().numpy()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(doubled(own)))
        for result in node.outputs:
            if result.dtype == single:
                result.type = ir.TensorType(double)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == single:
            value.type = ir.TensorType(double)
