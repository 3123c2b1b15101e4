# SPDX-License-Identifier: Apache-2.0
"""What an app holds: a loaded part of a bundle that takes arrays and gives arrays."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from perceiver_export.runtimes.checks import FeedChecks, check_finite_inputs, check_finite_outputs
from perceiver_export.runtimes.engines.backend import Array, AsyncEngine, Engine, Feeds
from perceiver_export.runtimes.errors import PerceiverExportError, RuntimeClosedError, UsageError
from perceiver_export.runtimes.manifest import TensorSpec

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["Array", "Engine", "Feeds", "Runtime"]

_IN_FLIGHT = 2  # one runs while the next is prepared
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _keep_engines() -> None:
    """In a forked child engines are never freed: their destructors would wait for threads that did not come along."""
    for engine in _engines:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_engines)


class Runtime:
    """A loaded graph. Safe to use from several threads; several runtimes may live in one process.

    It belongs to the process that loaded it: a forked child may not use it (engines' threads do not live on there) and
    is told so. A child of multiprocessing may load its own; one made by a bare `os.fork` beside ONNX Runtime must end
    with `os._exit`, because onnxruntime's exit handler waits there for ever. Use it as a context manager, or call
    `close`.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        precision: str,
        num_queries: int | None = None,
        *,
        compiled: str = "at load",
        check_finite: bool = False,
        certificates: tuple[str, ...] = (),
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.num_queries = num_queries  # of a decoder: how many queries there are to choose from
        self._described: dict[str, Any] = {"precision": precision, "compiled": compiled}
        if certificates:
            self._described["certificates"] = certificates
        self._check_finite = check_finite
        self._engine: Engine | None = engine
        # Outputs are only looked at here by threads of our own.
        self._own_requests = isinstance(engine, AsyncEngine) and not check_finite
        self._checks = FeedChecks(inputs, outputs, num_queries)
        self._process = os.getpid()
        _engines.add(engine)
        self._closed = False
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._workers: set[int] = set()  # the pool's threads

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Outputs by name for inputs by name; the arrays returned are the caller's to keep.

        With ``out`` (every output by name: right dtype and shape, C-contiguous, writeable, no memory shared with the
        inputs) the outputs are written there without allocating, and the same arrays are returned. The joined parts of
        a split bundle allocate what goes between them and their rows, and copy these to ``out``.

        Raises InputError: a missing or unknown name, wrong dtype or shape; RuntimeClosedError after `close`, and in a
        forked child; DeviceError: the device failed or went away.
        """
        return self._run(self._open_engine(), feeds, out)

    def _run(self, engine: Engine, feeds: Feeds, out: Mapping[str, Array] | None) -> dict[str, Array]:
        feeds = self._checked(feeds)
        if out is None:
            outputs = engine.run(feeds)
        else:
            engine.run_into(feeds, self._checks.out(feeds, out))
            outputs = dict(out)
        if self._check_finite:
            check_finite_outputs(outputs)
        return outputs

    def submit(self, feeds: Feeds) -> Future[dict[str, Array]]:
        """`run` in the background; the arrays in ``feeds`` must not change until the future is done.

        The engine's own asynchronous calls where it has them (OpenVINO; ONNX Runtime with more than one thread), else
        two threads. What `run` would raise the future raises; only RuntimeClosedError is raised here. A future's
        callback runs in the thread that finishes the others: it may submit and close, but not wait for another future.
        """
        with self._lock:
            engine = self._open_engine()
            if self._own_requests:
                try:
                    future = cast(AsyncEngine, engine).submit(self._checked(feeds))
                except PerceiverExportError as error:
                    return _failed(error)
                if future is not None:
                    return future
            if self._pool is None:
                from concurrent.futures import ThreadPoolExecutor

                workers = self._workers
                self._pool = ThreadPoolExecutor(
                    _IN_FLIGHT, "perceiver-export", initializer=lambda: workers.add(threading.get_ident())
                )
            # The engine goes along: `close` lets what was submitted finish.
            return self._pool.submit(self._run, engine, feeds, None)

    def stream(self, feeds: Iterable[Feeds], in_flight: int = _IN_FLIGHT) -> Iterator[dict[str, Array]]:
        """Outputs of an iterable of feeds, in its order; at most ``in_flight`` are on their way at any time.

        The iterable is read only as fast as outputs are taken, so a camera or a file never runs ahead of the device.
        What a call raises is raised in its place and ends the stream. Raises UsageError: ``in_flight`` below 1.
        """
        if in_flight < 1:
            raise UsageError(f"in_flight is {in_flight}", "give 1 or more; 2 keeps the device busy")
        return self._stream(iter(feeds), in_flight)

    def _stream(self, feeds: Iterator[Feeds], in_flight: int) -> Iterator[dict[str, Array]]:
        engine = self._open_engine()
        started: deque[Future[dict[str, Array]]] = deque()
        try:
            for one in feeds:
                started.append(self.submit(one))
                if len(started) >= in_flight:
                    yield started.popleft().result()
            while started:
                yield started.popleft().result()
        finally:
            for future in started:  # abandoned: what runs still reads the caller's arrays
                if not (future.cancel() or self._in_callback(engine)):
                    future.exception()

    def describe(self) -> dict[str, Any]:
        """What it really runs on: target, device, engine, versions, threads, precision, where it was compiled, and the
        certificates that hold here.
        """
        return {**self._described, **self._open_engine().describe()}

    def close(self) -> None:
        """Finish what was submitted and let go of the engine. May be called twice, and does nothing in a child.

        A future's callback may call it too: it then returns at once, and what was submitted is finished behind it.
        """
        if os.getpid() != self._process:
            return
        self._closed = True  # before the lock, which a thread that submits without end would hardly give up
        with self._lock:
            engine, self._engine = self._engine, None
            pool, self._pool = self._pool, None
        if pool is not None and engine is not None:
            pool.shutdown(wait=not self._in_callback(engine))
        if self._own_requests and engine is not None:
            cast(AsyncEngine, engine).close()

    def _in_callback(self, engine: Engine) -> bool:
        own = self._own_requests and cast(AsyncEngine, engine).in_callback()
        return own or threading.get_ident() in self._workers

    def _open_engine(self) -> Engine:
        engine = self._engine
        if engine is None or self._closed:
            raise RuntimeClosedError("this runtime is closed", "call load() again")
        if os.getpid() != self._process:
            raise RuntimeClosedError(
                "this runtime was loaded before the process forked", "call load() in the child, or start it with spawn"
            )
        return engine

    def _checked(self, feeds: Feeds) -> Feeds:
        checked = self._checks.feeds(feeds)
        if self._check_finite:
            check_finite_inputs(checked)
        return checked

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _failed(error: PerceiverExportError) -> Future[dict[str, Array]]:
    from concurrent.futures import Future

    future: Future[dict[str, Array]] = Future()
    future.set_exception(error)
    return future
