# SPDX-License-Identifier: Apache-2.0
"""An engine that runs a function of numpy in the place of a graph, for tests of what lies around the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perceiver_export.runtimes.manifest import TensorSpec
from perceiver_export.runtimes.runtime import Array, Feeds

Function = Callable[[Feeds], dict[str, Array]]


class NumpyEngine:
    """``calls`` are the feeds that it was given."""

    def __init__(self, function: Function, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.function, self.inputs, self.outputs = function, inputs, outputs
        self.calls: list[Feeds] = []

    def run(self, feeds: Feeds, out: Any = None) -> dict[str, Array]:
        assert out is None
        self.calls.append(feeds)
        return self.function(feeds)

    def describe(self) -> dict[str, Any]:
        return {"engine": "numpy", "version": "0", "device": "cpu", "precision": "fp32"}
