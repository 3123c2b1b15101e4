# SPDX-License-Identifier: Apache-2.0
"""Rewrites of the traced graph that change no number. onnx-ir's own passes where there is one."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import transpose_transpose_rule

from perceiver_export.exporter.passes.constants import FoldConstantsPass
from perceiver_export.exporter.passes.names import NameNodesPass
from perceiver_export.exporter.passes.settled import SettleTypesAndShapesPass


def run_passes(model: ir.Model) -> None:
    """Apply `PIPELINE` in place."""
    ir.passes.Sequential(*PIPELINE)(model)


PIPELINE: tuple[ir.passes.InPlacePass, ...] = (
    # One Transpose(W) a weight instead of one a use, so that folding makes one array of it.
    common.CommonSubexpressionEliminationPass(),
    SettleTypesAndShapesPass(),
    # Types and shapes of values that the exporter left open; folding needs them, and so does counting FLOPs.
    common.ShapeInferencePass(),
    # Features come as rows and are read as columns.
    RewritePass([transpose_transpose_rule]),
    FoldConstantsPass(),
    FoldConstantsPass(),  # again: what is expanded to a shape that was computed, and is small
    common.IdentityEliminationPass(),
    # What folding left without a reader.
    common.RemoveUnusedNodesPass(),
    common.RemoveUnusedOpsetsPass(),
    NameNodesPass(),
    # Last: names are made of metadata, and the rest of it (stack traces) holds paths of the exporting machine.
    common.ClearMetadataAndDocStringPass(),
)
