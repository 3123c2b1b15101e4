# SPDX-License-Identifier: Apache-2.0
"""The options that `run` hands to the command of each task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """``top``: labels to show of each input; ``json``: print JSON instead of tables."""

    top: int
    device: str
    threads: int | None
    json: bool
