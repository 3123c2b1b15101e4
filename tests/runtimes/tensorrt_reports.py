# SPDX-License-Identifier: Apache-2.0
"""The report beside an engine."""

from __future__ import annotations

from pathlib import Path

import msgspec

from perceiver_export.runtimes.engines.tensorrt_build import REPORT, LayerReport

__all__ = ["LayerReport", "read_report"]


def read_report(directory: Path) -> LayerReport:
    """layers.json."""
    return msgspec.json.decode((directory / REPORT).read_bytes(), type=LayerReport)
