# SPDX-License-Identifier: Apache-2.0
"""Requests of a sample each, run together: throughput for models exported with a batch."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from perceiver_export.runtimes.checks import FeedChecks
from perceiver_export.runtimes.engines.backend import Array, Feeds
from perceiver_export.runtimes.errors import RuntimeClosedError, UsageError
from perceiver_export.runtimes.manifest import TensorSpec

if TYPE_CHECKING:
    from perceiver_export.runtimes.runtime import Runtime

_ROWS = "rows"
_QUEUED_BATCHES = 4  # beyond these `submit` waits: requests must not pile up faster than they are answered
_IN_FLIGHT = 2


@dataclass
class _Request:
    feeds: Feeds
    rows: int
    future: Future[dict[str, Array]]


class Batcher:
    """Collects requests until there are ``max_batch`` samples or the first has waited ``max_wait`` seconds.

    The model's first axis is the batch, of a range or fixed; a fixed one is filled up with copies of the last sample.
    May be used from many threads. The runtime stays the caller's to close, after this one.
    """

    def __init__(self, runtime: Runtime, max_batch: int | None = None, max_wait: float = 0.002) -> None:
        """Raises UsageError: the model's tensors have no common batch axis, or no such batch."""
        self._runtime = runtime
        self._least, most = _batch_limits((*runtime.inputs, *runtime.outputs))
        self._most = most if max_batch is None else max_batch
        if not 1 <= self._most <= most or max_wait < 0:
            raise UsageError(
                f"max_batch is {self._most} and max_wait {max_wait}", f"the model takes 1 to {most} samples at once"
            )
        inputs, outputs = (tuple(_per_request(spec, self._most) for spec in specs) for specs in _specs(runtime))
        self._checks = FeedChecks(inputs, outputs, runtime.num_queries)
        self._max_wait = max_wait
        self._queue: queue.Queue[_Request | None] = queue.Queue(_QUEUED_BATCHES * self._most)
        self._slots = threading.Semaphore(_IN_FLIGHT)
        self._lock = threading.Lock()
        self._closed = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._collect, name="perceiver-export batcher", daemon=True)
        self._thread.start()

    def submit(self, feeds: Feeds) -> Future[dict[str, Array]]:
        """Queue a request of one sample or a few, (n, …) each; the arrays must not change until the future is done.

        Waits while four batches are queued already. The outputs are (n, …), the caller's to keep.

        Raises InputError, RuntimeClosedError.
        """
        feeds = self._checks.feeds(feeds)
        request = _Request(feeds, len(next(iter(feeds.values()))), Future())
        with self._lock:
            if self._closed or os.getpid() != self._process:
                raise RuntimeClosedError("this batcher is closed, or of another process", "make a new one")
            self._queue.put(request)
        return request.future

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """`submit`, and wait."""
        return self.submit(feeds).result()

    def close(self) -> None:
        """Answer what was submitted. May be called twice."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()
        for _ in range(_IN_FLIGHT):
            self._slots.acquire()
        self._slots.release(_IN_FLIGHT)

    def _collect(self) -> None:
        kept: _Request | None = None
        while True:
            first = kept or self._queue.get()
            if first is None:
                return
            batch, kept, ended = self._fill(first)
            live = [request for request in batch if request.future.set_running_or_notify_cancel()]
            if live:
                self._slots.acquire()
                self._start(live)
            if ended:
                return

    def _fill(self, first: _Request) -> tuple[list[_Request], _Request | None, bool]:
        """A batch; a request that did not fit into it; whether `close` was called."""
        batch, rows = [first], first.rows
        deadline = time.monotonic() + self._max_wait
        while rows < self._most:
            try:
                request = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if request is None:
                return batch, None, True
            if rows + request.rows > self._most:
                return batch, request, False
            batch.append(request)
            rows += request.rows
        return batch, None, False

    def _start(self, batch: Sequence[_Request]) -> None:
        def done(future: Future[dict[str, Array]]) -> None:
            self._slots.release()
            _answer(batch, future)

        try:
            self._runtime.submit(self._joined(batch)).add_done_callback(done)
        except Exception as error:  # the runtime was closed first
            self._slots.release()
            for request in batch:
                request.future.set_exception(error)

    def _joined(self, batch: Sequence[_Request]) -> dict[str, Array]:
        missing = self._least - sum(request.rows for request in batch)
        joined = {}
        for spec in self._runtime.inputs:
            arrays = [request.feeds[spec.name] for request in batch]
            if missing > 0:
                arrays.append(np.repeat(arrays[-1][-1:], missing, axis=0))
            joined[spec.name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return joined

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answer(batch: Sequence[_Request], future: Future[dict[str, Array]]) -> None:
    error = future.exception()
    start = 0
    for request in batch:
        if error is not None:
            request.future.set_exception(error)
            continue
        rows = slice(start, start + request.rows)
        request.future.set_result({name: array[rows] for name, array in future.result().items()})
        start += request.rows


def _specs(runtime: Runtime) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    return runtime.inputs, runtime.outputs


def _batch_limits(specs: tuple[TensorSpec, ...]) -> tuple[int, int]:
    first = specs[0]
    batch = first.shape[0] if first.shape else 0
    if any(not spec.shape or spec.shape[0] != batch for spec in specs):
        raise UsageError("the model's inputs and outputs have no common batch axis", "run it without a batcher")
    return (batch, batch) if isinstance(batch, int) else first.ranges[batch]


def _per_request(spec: TensorSpec, most: int) -> TensorSpec:
    """What one request may bring: any number of samples up to a batch."""
    return msgspec.structs.replace(spec, shape=(_ROWS, *spec.shape[1:]), ranges={**spec.ranges, _ROWS: (1, most)})
