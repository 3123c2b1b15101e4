# SPDX-License-Identifier: Apache-2.0
"""Which inputs and outputs of a node may have 16-bit types, by ONNX's schemas."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.defs
import onnx_ir as ir

from perceiver_export.calibration.graphs import is_large
from perceiver_export.runtimes.errors import UnsupportedModelError, first_line

# ONNX allows bfloat16 in most operators from this opset on. TensorRT takes it in graphs of any opset.
_BF16_OPSET = 22


def allowed(node: ir.Node, dtype: ir.DataType) -> list[str]:
    """The schema's name for the type of each input, as `T`; empty if ``dtype`` is not allowed."""
    schema = _schema(node, dtype)
    formals = _formals(schema.inputs, len(node.inputs)) if schema else []
    kind = f"tensor({dtype.name.lower()})"
    return [one.type_str if kind in one.types else "" for one in formals] or [""] * len(node.inputs)


def follows(node: ir.Node, dtype: ir.DataType) -> bool:
    """Whether float outputs get ``dtype`` because float inputs have it, not from the schema or an attribute."""
    floats = [index for index, value in enumerate(node.outputs) if value.dtype == ir.DataType.FLOAT]
    if not floats or node.op_type == "Cast":
        return True
    names = allowed(node, dtype)
    if node.op_type == "DequantizeLinear":  # since opset 23 the schema does not say that y has its scale's type
        return bool(names[1])
    inputs = zip(names, node.inputs, strict=True)
    given = {name for name, value in inputs if value is not None and value.dtype == ir.DataType.FLOAT}
    schema = _schema(node, dtype)
    formals = _formals(schema.outputs, len(node.outputs)) if schema else []
    return bool(formals) and all(formals[index].type_str in given for index in floats)


def check_types(model: ir.Model, dtype: ir.DataType) -> None:
    """Raise UnsupportedModelError if a node has types that ONNX does not allow."""
    import onnx_ir.passes.common as common

    checked = model.clone()
    checked.opset_imports[""] = _opset(checked.opset_imports.get("", 1), dtype)
    for name, value in list(checked.graph.initializers.items()):
        if is_large(value.const_value):  # the checker would look for its file
            del checked.graph.initializers[name]
            value.const_value = None
            checked.graph.inputs.append(value)
    for value in (made for node in checked.graph for made in node.outputs if not made.is_graph_output()):
        value.shape = None  # engines infer shapes themselves
    try:
        common.CheckerPass(full_check=True)(checked)
    except Exception as error:  # onnx has several, and onnx-ir wraps them
        said = first_line(error.__cause__ or error)
        raise UnsupportedModelError(f"the rewritten graph is not valid: {said}", "report it with the model") from error


def _schema(node: ir.Node, dtype: ir.DataType) -> onnx.defs.OpSchema | None:
    if node.graph is None or not onnx.defs.has(node.op_type, node.domain):
        return None
    version = node.graph.opset_imports.get(node.domain, 1)
    return onnx.defs.get_schema(node.op_type, version if node.domain else _opset(version, dtype), node.domain)


def _opset(version: int, dtype: ir.DataType) -> int:
    return max(version, _BF16_OPSET) if dtype == ir.DataType.BFLOAT16 else version


def _formals(
    formals: Sequence[onnx.defs.OpSchema.FormalParameter], count: int
) -> list[onnx.defs.OpSchema.FormalParameter]:
    """One parameter for each value; the last may stand for several."""
    return [formals[min(index, len(formals) - 1)] for index in range(count)]
