# SPDX-License-Identifier: Apache-2.0
"""A CUDA driver over numpy arrays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class FakeMemory:
    """A CUDA driver over numpy arrays: host and device sides apart, or one where ``shared``.

    ``capacity`` is in bytes; a graph that is captured is the list of calls that were made.
    """

    def __init__(self, shared: bool = False, capacity: int = 1 << 20, graphs: bool = True) -> None:
        self.shared, self.capacity, self.graphs = shared, capacity, graphs
        self.blocks: dict[int, np.ndarray[Any, Any]] = {}
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.running = threading.Event()  # cleared by a test that wants work to take long
        self.running.set()
        self._streams = 0
        self._recording: list[Callable[[], None]] | None = None
        self._graphs: list[list[Callable[[], None]]] = []

    def floats(self, address: int) -> np.ndarray[Any, Any]:
        return self.blocks[address].view(np.float32)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        own = getattr(type(self), f"_{name}", None)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            self.threads.add(threading.get_ident())
            return 0 if own is None else int(own(self, *arguments) or 0)

        return call

    def _cuDeviceGetAttribute(self, result: Any, attribute: int, device: Any) -> None:  # noqa: N802
        result._obj.value = int(self.shared)

    def _cuMemHostAlloc(self, result: Any, nbytes: Any, flags: int) -> int:  # noqa: N802
        return self._allocate(result, nbytes.value)

    def _cuMemAlloc_v2(self, result: Any, nbytes: Any) -> int:  # noqa: N802
        return self._allocate(result, nbytes.value)

    def _allocate(self, result: Any, nbytes: int) -> int:
        if nbytes > self.capacity:
            return 2
        block = np.zeros(-(-nbytes // 4) * 4, np.uint8)
        self.blocks[block.ctypes.data] = block
        result._obj.value = block.ctypes.data
        return 0

    def _cuMemHostGetDevicePointer_v2(self, result: Any, host: Any, flags: int) -> None:  # noqa: N802
        result._obj.value = host.value

    def _cuMemcpyHtoDAsync_v2(self, device: Any, host: Any, nbytes: Any, stream: Any) -> None:  # noqa: N802
        self.work(lambda: self._copy(device.value, host.value, nbytes.value))

    def _cuMemcpyDtoHAsync_v2(self, host: Any, device: Any, nbytes: Any, stream: Any) -> None:  # noqa: N802
        self.work(lambda: self._copy(host.value, device.value, nbytes.value))

    def work(self, job: Callable[[], None]) -> None:
        """Do it, or write it down where a graph is being recorded: then nothing is done yet."""
        if self._recording is None:
            job()
        else:
            self._recording.append(job)

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        self.blocks[target][:nbytes] = self.blocks[source][:nbytes]

    def _cuStreamCreate(self, result: Any, flags: int) -> None:  # noqa: N802
        self._streams += 1
        result._obj.value = self._streams

    def _cuStreamSynchronize(self, stream: Any) -> None:  # noqa: N802
        assert self.running.wait(60)

    def _cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:  # noqa: N802
        self._recording = [] if self.graphs else None
        return 0 if self.graphs else 900

    def _cuStreamEndCapture(self, stream: Any, result: Any) -> None:  # noqa: N802
        assert self._recording is not None
        self._graphs.append(self._recording)
        result._obj.value = len(self._graphs)
        self._recording = None

    def _cuGraphInstantiateWithFlags(self, result: Any, graph: Any, flags: Any) -> None:  # noqa: N802
        result._obj.value = graph.value

    def _cuGraphLaunch(self, graph: Any, stream: Any) -> None:  # noqa: N802
        for job in self._graphs[graph.value - 1]:
            job()

    def _cuGetErrorString(self, code: int, result: Any) -> None:  # noqa: N802
        result._obj.value = {2: b"out of memory"}.get(code, b"operation not permitted")
