# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: nothing. Its low-precision passes take the canonical form as it is; the tests count its integer layers."""

from __future__ import annotations

import onnx_ir as ir


def lower(model: ir.Model) -> None:
    """Leave the canonical graph as it is."""
