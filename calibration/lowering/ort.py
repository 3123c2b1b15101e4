# SPDX-License-Identifier: Apache-2.0
"""Which rewrite of the canonical quantized graph ONNX Runtime gets on which processor."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from perceiver_export.calibration.lowering import ort_arm, ort_x86

# By target, with `-arm64` where ARM wants another form. OpenVINO runs the canonical graph as it is (`openvino.py`).
LOWERINGS: dict[str, Callable[[ir.Model], None]] = {"ort-cpu": ort_x86.lower, "ort-cpu-arm64": ort_arm.lower}
