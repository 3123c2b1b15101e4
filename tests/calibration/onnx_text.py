# SPDX-License-Identifier: Apache-2.0
"""Small graphs as text, with their constants as arrays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser


def write(path: Path, body: str, opset: int = 20, **constants: np.ndarray[Any, Any]) -> Path:
    """Write `(inputs) => (outputs) { nodes }`; names of ``constants`` may stand in it without being declared, and so
    may domains, as in `mine.Operator(x)`.
    """
    domains = "".join(f', "{domain}": 1' for domain in sorted(set(re.findall(r"= ([a-z.]+)[.][A-Z]\w*\(", body))))
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}{domains}]> g {body}')
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path
