# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on ARM: kernels there multiply int8 by int8, so activations stay; only shapes are put right.

The bias and the rank of products matter as on x86 (`ort_x86`): onnxruntime's rewrite to Gemm is the same.
"""

from __future__ import annotations

import onnx_ir as ir

from perceiver_export.calibration.gemm import remove_unused
from perceiver_export.calibration.lowering.shapes import raise_rank_2, widen_biases


def lower(model: ir.Model) -> None:
    """Rewrite a canonical graph in place."""
    raise_rank_2(model.graph)
    widen_biases(model.graph)
    remove_unused(model.graph)
