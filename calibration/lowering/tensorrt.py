# SPDX-License-Identifier: Apache-2.0
"""The graph that TensorRT gets: precision in its types, heads that fuse, no operator that its version lacks."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from perceiver_export.calibration.lowering.attention import pad_heads
from perceiver_export.calibration.lowering.half import overflows, to_half
from perceiver_export.calibration.lowering.opset import to_opset_17
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.engines.tensorrt_network import KEEP_FP32
from perceiver_export.runtimes.errors import UnsupportedModelError

FAMILIES = ("tensorrt", "tensorrt8")  # precision in the graph, from 10 on; precision in flags


def lower_for_tensorrt(
    model: ir.Model, family: str, precision: Precision, hazards: Mapping[str, float] | None = None
) -> dict[str, str]:
    """Rewrite a canonical graph, fp32 or with Q/DQ, in place; gives the nodes kept in fp32, each with the reason.

    ``family`` is `Capabilities.lowering` of the version. ``hazards`` is the largest |x| seen of each tensor.
    """
    pad_heads(model)
    kept: dict[str, str] = {}
    if family == "tensorrt8":
        if precision == "bf16":
            raise UnsupportedModelError("TensorRT 8 has no bf16", "give --precision fp16")
        if has_int4(model.graph):
            raise UnsupportedModelError("TensorRT 8 has no int4", "quantize with --scheme int8-weights")
        kept = overflows(model.graph, "fp16", hazards or {}) if precision != "fp32" else {}
        for node in model.graph:
            if node.name in kept:
                node.name = f"{node.name}{KEEP_FP32}"
        to_opset_17(model)
    elif precision != "fp32":
        kept = to_half(model, precision, hazards)
    return kept


def has_int4(graph: ir.Graph) -> bool:
    """Whether weights are int4, which opset 21 is the first to have."""
    return any(value.dtype == ir.DataType.INT4 for value in graph.initializers.values())
