# SPDX-License-Identifier: Apache-2.0
"""torch model -> ONNX graph, by torch's dynamo exporter, then our passes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch

from perceiver_export.exporter.batch import Batch
from perceiver_export.exporter.passes import run_passes
from perceiver_export.exporter.perceiver.model import PerceiverIO
from perceiver_export.runtimes.errors import ExportError
from perceiver_export.runtimes.manifest import TensorSpec

OPSET = 20
IR_VERSION = 10  # onnxruntime 1.23, the newest for Python 3.10, refuses 12 and above


def trace(model: PerceiverIO, batch: Batch) -> ir.Model:
    """The canonical graph: constants baked, weights stored once, nodes named by the module they come from.

    Raises ExportError where torch cannot trace the model.
    """
    example = torch.zeros(max(batch.typical, 2) if batch.dynamic else batch.typical, *model.input_adapter.shape)
    dynamic = {"image": {0: torch.export.Dim("batch", min=batch.least, max=batch.most)}} if batch.dynamic else None
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=dynamic,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"torch cannot trace this model: {str(error).splitlines()[0]}", "report it with the config"
        ) from error
    assert program is not None
    graph = program.model
    graph.ir_version = IR_VERSION
    try:
        run_passes(graph)
    except ir.passes.PassError as error:
        raise ExportError(
            f"the traced graph cannot be folded: {error.__cause__}", "report it with the config"
        ) from error
    return graph


def tensor_specs(model: PerceiverIO, batch: Batch) -> tuple[TensorSpec, TensorSpec]:
    """The input and the output of the traced model, as the manifest describes them."""
    size: int | str = "batch" if batch.dynamic else batch.typical
    ranges = {"batch": (batch.least, batch.most)} if batch.dynamic else {}
    return (
        TensorSpec(
            "image", "float32", (size, *model.input_adapter.shape), "preprocessed pictures, channels first", ranges
        ),
        TensorSpec(
            "logits",
            "float32",
            (size, model.config.decoder.num_output_channels),
            "one score a label, before softmax",
            ranges,
        ),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter talks on every channel (progress, notes about torchvision, its own deprecations)."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
