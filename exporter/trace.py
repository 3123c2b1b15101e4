# SPDX-License-Identifier: Apache-2.0
"""torch module -> ONNX graph, by torch's dynamo exporter, then our passes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch

from perceiver_export.exporter.parts import GraphPart
from perceiver_export.exporter.passes import run_passes
from perceiver_export.exporter.perceiver.config import PerceiverConfig
from perceiver_export.exporter.sample_inputs import sample_inputs
from perceiver_export.runtimes.errors import ExportError
from perceiver_export.runtimes.manifest import TensorSpec

OPSET = 20
IR_VERSION = 10  # onnxruntime 1.23, the newest for Python 3.10, refuses 12 and above


def trace(part: GraphPart, config: PerceiverConfig) -> ir.Model:
    """The canonical graph: constants baked, weights stored once, nodes named by the module they come from.

    Raises ExportError where torch cannot trace the model.
    """
    # A size of 1 would be taken for a constant; of a dynamic dimension any other will do.
    sizes = {name: max(size, 2) for name, size in part.typical.items()}
    example = sample_inputs(part, config, sizes, seed=0)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                part.module,
                tuple(torch.from_numpy(array) for array in example.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in part.inputs],
                output_names=[spec.name for spec in part.outputs],
                dynamic_shapes=_dynamic_shapes(part.inputs),
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


def _dynamic_shapes(specs: tuple[TensorSpec, ...]) -> Any:
    if not any(spec.ranges for spec in specs):
        return None
    dims: dict[str, Any] = {}
    shapes = []
    for spec in specs:
        for name, (least, most) in spec.ranges.items():
            dims.setdefault(name, torch.export.Dim(name, min=least, max=most))
        shapes.append({axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)})
    return (tuple(shapes),)  # one tuple for the one argument, *tensors


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
