# SPDX-License-Identifier: Apache-2.0
"""How large the numbers of a graph become: on the golden inputs, and on the data that it was quantized with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.sessions import open_session
from perceiver_export.runtimes.engines.backend import Feeds

_FLOATS = (ir.DataType.FLOAT,)


def magnitudes(path: Path, feeds: Feeds) -> dict[str, float]:
    """The largest |x| of every float tensor of an fp32 graph in one run; the reductions run inside of the graph, each
    right behind what it reduces: at the end they would keep every tensor of the graph alive.
    """
    model = ir.load(path)
    graph = model.graph
    values, outputs = [], []
    for node in list(graph):
        for value in node.outputs:
            if value.dtype in _FLOATS:
                values.append(value)
                outputs += _reductions(graph, node, value)
    graph.outputs.extend(outputs)
    names = [output.name for output in outputs]
    bounds = open_session(model, path.parent, in_order=True).run(names, dict(feeds))
    return {
        value.name or "": float(max(abs(np.min(low)), abs(np.max(high))))
        for value, low, high in zip(values, bounds[::2], bounds[1::2], strict=True)
    }


def _reductions(graph: ir.Graph, node: ir.Node, value: ir.Value) -> list[ir.Value]:
    bounds = [ir.Value(name=f"{value.name}.{operator}") for operator in ("ReduceMin", "ReduceMax")]
    graph.insert_after(
        node,
        [
            ir.node((bound.name or "").rpartition(".")[2], [value], {"keepdims": 0}, outputs=[bound], name=bound.name)
            for bound in bounds
        ],
    )
    return bounds


def calibrated(path: Path, part: str) -> dict[str, float]:
    """What calibration.json says of tensors that overflow fp16; nothing where a bundle has none."""
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
        return {one["name"]: float(one["largest"]) for one in parts[part]["hazards"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
