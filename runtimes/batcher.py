# SPDX-License-Identifier: Apache-2.0
"""Requests of a sample each, run together: throughput for models exported with a batch."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
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
    future: Future[dict[str, Array]] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects requests until there are ``max_batch`` samples or the first has waited ``max_wait`` seconds.

    The model's first axis is the batch, of a range or fixed; a fixed one is filled up with copies of the last sample.
    May be used from many threads. The runtime stays the caller's to close, after this one. A future's callback may
    call `submit` and `close`, which do not wait there; waiting for another future in it (`run`) may wait for ever.
    """

    def __init__(self, runtime: Runtime, max_batch: int | None = None, max_wait: float = 0.002) -> None:
        """Raises UsageError: the model's tensors have no common batch axis, or no such batch."""
        self._runtime = runtime
        self._least, most = _batch_limits((*runtime.inputs, *runtime.outputs))
        self._most = most if max_batch is None else max_batch
        if not 1 <= self._most <= most or not 0 <= max_wait <= threading.TIMEOUT_MAX:
            raise UsageError(
                f"max_batch is {self._most} and max_wait {max_wait}",
                f"the model takes 1 to {most} samples at once; max_wait is in seconds",
            )
        inputs, outputs = (tuple(_per_request(spec, self._most) for spec in specs) for specs in _specs(runtime))
        self._checks = FeedChecks(inputs, outputs, runtime.num_queries)
        self._max_wait = max_wait
        self._queue: deque[_Request] = deque()
        self._lock = threading.Lock()
        self._room, self._work, self._idle = (threading.Condition(self._lock) for _ in range(3))
        self._running = 0  # batches on the device
        self._unanswered = 0  # requests
        self._calling: set[int] = set()  # threads that are in callers' callbacks
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
        if os.getpid() != self._process:  # where the lock may be held for ever
            raise RuntimeClosedError("this batcher is of the process that forked", "make a new one")
        request = _Request(feeds, len(next(iter(feeds.values()))))
        with self._lock:
            self._room.wait_for(self._may_queue)
            if self._closed:
                raise RuntimeClosedError("this batcher is closed", "make a new one")
            self._queue.append(request)
            self._unanswered += 1
            self._work.notify()
        return request.future

    def _may_queue(self) -> bool:
        waits = len(self._queue) >= _QUEUED_BATCHES * self._most and threading.get_ident() not in self._calling
        return self._closed or not waits

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """`submit`, and wait."""
        return self.submit(feeds).result()

    def close(self) -> None:
        """Answer what was submitted. May be called twice, and does nothing in a child.

        In a future's callback it returns at once, and what was submitted is answered behind it: the runtime must stay
        open until then.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            self._room.notify_all()
            self._work.notify()
            if threading.get_ident() in self._calling:  # which does not wait for itself; the interpreter's exit does
                threading.Thread(target=self.close, name="perceiver-export-close", daemon=False).start()
                return
            self._idle.wait_for(lambda: not self._unanswered)
        self._thread.join()

    def _collect(self) -> None:
        while batch := self._next_batch():
            live = [request for request in batch if request.future.set_running_or_notify_cancel()]
            if live:
                self._start(live)
            self._answered(len(batch) - len(live))

    def _next_batch(self) -> list[_Request]:
        """What goes together, when there is enough of it or it has waited; nothing once all is handed on."""
        with self._lock:
            self._work.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return []
            wait = self._queue[0].arrived + self._max_wait - time.monotonic()
            self._work.wait_for(self._enough, max(0.0, wait))
            self._work.wait_for(lambda: self._running < _IN_FLIGHT)
            batch = [self._queue.popleft()]
            rows = batch[0].rows
            while self._queue and rows + self._queue[0].rows <= self._most:
                batch.append(self._queue.popleft())
                rows += batch[-1].rows
            self._room.notify_all()
            return batch

    def _enough(self) -> bool:
        return self._closed or sum(request.rows for request in self._queue) >= self._most

    def _answered(self, requests: int) -> None:
        with self._lock:
            self._unanswered -= requests
            if not self._unanswered:
                self._idle.notify_all()

    def _start(self, batch: Sequence[_Request]) -> None:
        with self._lock:
            self._running += 1
        try:
            future = self._runtime.submit(self._joined(batch))
        except Exception as error:  # the runtime was closed first, or memory is short
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda done: self._finish(batch, done))

    def _finish(self, batch: Sequence[_Request], done: Future[dict[str, Array]]) -> None:
        thread = threading.get_ident()
        with self._lock:
            self._running -= 1  # before the callers' callbacks, so that the device does not wait for them
            self._work.notify()
        self._calling.add(thread)
        try:
            _answer(batch, done)
        finally:
            self._calling.discard(thread)
            self._answered(len(batch))

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
