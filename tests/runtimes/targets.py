# SPDX-License-Identifier: Apache-2.0
"""The targets that the tests run on. One that is expected and not here fails; PERCEIVER_TEST_TARGETS expects others."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from perceiver_export.runtimes.figures import Measured, platform_of

EXPECTED = tuple(os.environ.get("PERCEIVER_TEST_TARGETS", "ort-cpu,openvino-cpu").split(","))
needs_openvino = pytest.mark.skipif(
    "openvino-cpu" not in EXPECTED, reason="PERCEIVER_TEST_TARGETS expects no OpenVINO: Python 3.10 is tested without"
)


def latencies(precision: str = "fp32", threads: str = "all cores", **milliseconds: float) -> dict[str, Any]:
    """By target (``ort_cpu=2.0``), as `bench --save` keeps them here."""
    named = {name.replace("_", "-"): value for name, value in milliseconds.items()}
    kept = {one: Measured(value, 0.0, 1, precision, threads, platform_of(one)) for one, value in named.items()}
    return dict(msgspec.to_builtins(kept))
