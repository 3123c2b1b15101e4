# SPDX-License-Identifier: Apache-2.0
"""The options that `run` hands to the command of each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_export.runtimes.engines.backend import Precision


@dataclass(frozen=True)
class RunOptions:
    """``top``: labels to show of each input; ``json``: print JSON instead of tables; ``check_finite``: refuse NaN.

    ``precision`` is that of the engine to take, None the one that was built last.
    """

    top: int
    device: str
    threads: int | None
    json: bool
    check_finite: bool = False
    precision: Precision | None = None

    def open_task(self, bundle: str) -> Any:
        """The bundle's task, as these options say. Raises what `runtimes.open_task` raises."""
        from perceiver_export.runtimes.tasks import open_task

        return open_task(bundle, self.device, self.threads, "auto", self.check_finite, self.precision)
