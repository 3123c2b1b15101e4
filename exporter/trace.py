# SPDX-License-Identifier: Apache-2.0
"""torch module -> ONNX graph, by torch's dynamo exporter, then our passes."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch.onnx import OnnxExporterError

from perceiver_export.exporter.parts import GraphPart
from perceiver_export.exporter.passes import run_passes
from perceiver_export.exporter.perceiver.config import PerceiverConfig
from perceiver_export.exporter.sample_inputs import sample_inputs
from perceiver_export.runtimes.errors import ExportError
from perceiver_export.runtimes.manifest import TensorSpec

OPSET = 20
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours
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
    except OnnxExporterError as error:
        raise ExportError(
            f"torch cannot trace this model: {_reason(error)}", "report it with the config; --no-fold may do meanwhile"
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


def _reason(error: BaseException) -> str:
    """What went wrong, in a line: torch's own message is a page of advice round the error that it caught."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in _ESCAPES.sub("", str(error)).splitlines() if line.strip()]
    return ": ".join((type(error).__name__, *lines[:1]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter talks on every channel (progress, notes about torchvision, its own deprecations, stack traces
    of what it raises anyway).
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # handlers of torch's loggers keep the stderr that they were made with
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
