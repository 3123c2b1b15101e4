# SPDX-License-Identifier: Apache-2.0
"""Join requests of one or a few samples into batches, for higher throughput of models exported with a batch."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np

from perceiver_export.runtimes import exits
from perceiver_export.runtimes.engines.backend import Array, Feeds
from perceiver_export.runtimes.errors import RuntimeClosedError, UsageError, check_kind, check_whole
from perceiver_export.runtimes.manifest import TensorSpec
from perceiver_export.runtimes.runtime import IN_FLIGHT, FeedChecks, Runtime, pad_batch

_ROWS = "rows"
_QUEUED_BATCHES = 4  # when the queue is full `submit` waits, so that requests do not pile up


class _Request(NamedTuple):
    feeds: Feeds
    rows: int
    future: Future[dict[str, Array]]
    arrived: float


class Batcher:
    """Collects requests until there are ``max_batch`` samples or the first has waited ``max_wait`` seconds.

    The model's first axis is the batch, of fixed or variable size; a fixed batch is padded with copies of the last
    sample. It is thread-safe. Close it before its runtime, which the caller closes. A future's callback may call
    `submit` and `close`, which do not wait there. Waiting for another future in a callback (`run`) may never end.
    """

    def __init__(self, runtime: Runtime, max_batch: int | None = None, max_wait: float = 0.002) -> None:
        """Raises UsageError: the model's tensors have no common batch axis, or ``max_batch`` is out of range."""
        self._runtime = runtime
        most = _largest_batch((*runtime.inputs, *runtime.outputs))
        self._most = most if max_batch is None else max_batch
        check_whole("max_batch", self._most, 1, most, f"give 1 to {most} samples")
        check_kind("max_wait", max_wait, (int, float), "seconds")
        if not 0 <= max_wait <= threading.TIMEOUT_MAX:
            raise UsageError(f"max_wait is {max_wait}", "give seconds, 0 or more")
        self._max_wait = max_wait
        inputs, outputs = (
            tuple(_with_any_rows(spec, self._most) for spec in specs) for specs in (runtime.inputs, runtime.outputs)
        )
        self._checks = FeedChecks(inputs, outputs, check_finite=runtime.check_finite)
        self._changed = threading.Condition()  # guards the next four fields
        self._queue: deque[_Request] = deque()
        self._running = 0  # batches on the device
        self._answering = 0  # requests that left the queue
        self._closed = False
        self._calling: set[int] = set()  # threads that run callers' callbacks
        self._process = os.getpid()
        self._worker = threading.Thread(target=self._work, name="perceiver-export batcher", daemon=True)
        self._worker.start()
        exits.close_at_exit(self)

    @exits.awaited
    def submit(self, feeds: Feeds) -> Future[dict[str, Array]]:
        """Queue a request of n samples: arrays (n, …) by name, which must not change until the future is done.

        It waits while four batches are queued. The outputs are (n, …); the caller owns them.

        Raises InputError, RuntimeClosedError.
        """
        feeds = self._checks.feeds(feeds)
        if os.getpid() != self._process:  # in a child the lock may be held forever
            raise RuntimeClosedError("this batcher belongs to the parent process", "create a new one in the child")
        request = _Request(feeds, len(next(iter(feeds.values()))), Future(), time.monotonic())
        with self._changed:
            most, calling = _QUEUED_BATCHES * self._most, threading.get_ident() in self._calling
            self._changed.wait_for(lambda: self._closed or calling or len(self._queue) < most)
            if not self._closed:
                self._queue.append(request)
                self._changed.notify_all()
                return request.future
        if exits.closing and not exits.hold():
            return request.future  # in a callback at exit: nothing waits for this future
        raise RuntimeClosedError("this batcher is closed", "create a new one")

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """`submit` and wait."""
        return self.submit(feeds).result()

    def close(self) -> None:
        """Finish every accepted request. May be called twice; does nothing in a forked child.

        In a future's callback it returns at once, and the remaining requests finish in the background: keep the runtime
        open until then.
        """
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if threading.get_ident() in self._calling:  # it cannot wait for itself, but Python waits for this thread
                threading.Thread(target=self.close, name="perceiver-export-close", daemon=False).start()
                return
            self._changed.wait_for(lambda: not (self._queue or self._answering))
        self._worker.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                future = self._runtime.submit(self._joined(batch))
            except Exception as error:  # the runtime was closed first, or memory ran out
                future = Future()
                future.set_exception(error)
            future.add_done_callback(partial(self._finish, batch))

    def _next_batch(self) -> list[_Request]:
        """The next requests to run together, once there are enough or the first has waited; empty after `close`."""
        with self._changed:
            while self._changed.wait_for(lambda: self._queue or self._closed) and self._queue:
                left = self._queue[0].arrived + self._max_wait - time.monotonic()
                self._changed.wait_for(
                    lambda: self._closed or sum(request.rows for request in self._queue) >= self._most, max(0.0, left)
                )
                self._changed.wait_for(lambda: self._running < IN_FLIGHT)
                batch: list[_Request] = []
                while self._queue and sum(one.rows for one in batch) + self._queue[0].rows <= self._most:
                    batch.append(self._queue.popleft())
                live = [request for request in batch if request.future.set_running_or_notify_cancel()]
                self._answering += len(live)
                self._running += bool(live)
                self._changed.notify_all()
                if live:
                    return live
            return []

    @exits.awaited
    def _finish(self, batch: list[_Request], done: Future[dict[str, Array]]) -> None:
        with self._changed:  # before the callers' callbacks, so that they do not keep the device idle
            self._running -= 1
            self._changed.notify_all()
        self._calling.add(threading.get_ident())
        try:
            error, start = done.exception(), 0
            for request in batch:
                rows = slice(start, start := start + request.rows)
                own = {} if error else {name: array[rows] for name, array in done.result().items()}
                exits.answer(request.future, own, error)
        finally:
            self._calling.discard(threading.get_ident())
            with self._changed:
                self._answering -= len(batch)
                self._changed.notify_all()

    def _joined(self, batch: list[_Request]) -> dict[str, Array]:
        arrays = {spec.name: [request.feeds[spec.name] for request in batch] for spec in self._runtime.inputs}
        joined = {name: own[0] if len(own) == 1 else np.concatenate(own) for name, own in arrays.items()}
        return pad_batch(self._runtime, joined)


def _with_any_rows(spec: TensorSpec, most: int) -> TensorSpec:
    """The same tensor with a batch of 1 to ``most`` samples."""
    return msgspec.structs.replace(spec, shape=(_ROWS, *spec.shape[1:]), ranges={**spec.ranges, _ROWS: (1, most)})


def _largest_batch(specs: tuple[TensorSpec, ...]) -> int:
    batch = specs[0].shape[0] if specs[0].shape else 0
    if any(not spec.shape or spec.shape[0] != batch for spec in specs):
        raise UsageError("the model's inputs and outputs have no common batch axis", "run it without a batcher")
    if isinstance(batch, str) and batch not in specs[0].ranges:
        raise UsageError(f"the batch axis {batch!r} has no range, so batches have no limit", "export a bundle")
    return specs[0].limits(0)[1]
