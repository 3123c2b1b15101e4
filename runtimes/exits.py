# SPDX-License-Identifier: Apache-2.0
"""Exit cleanly while engines run: calls in flight finish, and no new ones start.

If a thread returns from an engine while Python shuts down, Python ends the thread inside the engine's C++ code, which
aborts the process. So an `atexit` hook waits for such threads. It does not count calls: it searches the stacks of all
threads for functions marked with `awaited`. These functions call `enter` or `hold` once `ending` is set.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import CodeType, FrameType
from typing import Any, Protocol, TypeVar

_log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., object])


class Closer(Protocol):
    """An object with submitted work."""

    def close(self) -> None:
        """Wait until all of it is done."""


closing = False  # batchers accept no more requests
ending = False  # runtimes also accept no more calls
STEP = 0.0005  # seconds
_awaited: set[CodeType] = set()
_batchers: weakref.WeakSet[Closer] = weakref.WeakSet()
_armed = False
_lock = threading.Lock()
_forever = threading.Lock()
_forever.acquire()


def awaited(function: F) -> F:
    """Mark a function for which the exit hook waits in every thread."""
    _awaited.add(function.__code__)
    return function


def close_at_exit(batcher: Closer) -> None:
    """Close a batcher at exit, before its runtime. The reference to it is weak."""
    with _lock:
        _batchers.add(batcher)
    arm()


def arm() -> None:
    """Make the exit hook run before the hooks that engines' libraries have registered."""
    import concurrent.futures.thread  # noqa: F401  it cannot be imported once Python shuts down

    global _armed
    atexit.unregister(_end)
    atexit.register(_end)
    _armed = True


def enter() -> None:
    """Begin a function marked with `awaited`. See `hold`."""
    if not _armed:
        arm()
    if ending:
        hold()


def hold() -> bool:
    """At exit: True in the main thread, which may still make calls; False in a future's callback, for which the exit
    hook waits. In any other thread it never returns, and the program ends without that thread.

    Call it from a function marked with `awaited`.
    """
    if threading.current_thread() is threading.main_thread():
        return True
    if _calls_within(sys._getframe()) < 2:
        _forever.acquire()
    return False


def _end() -> None:
    global closing, ending
    closing = True
    with _lock:  # other threads may still add one
        batchers = tuple(_batchers)
    for batcher in batchers:
        batcher.close()
    ending = True
    _wait()


def _wait() -> None:
    """Wait until no other thread is in an engine or may return to one."""
    here = threading.get_ident()
    while any(
        thread != here and frame.f_code is not hold.__code__ and _calls_within(frame)
        for thread, frame in sys._current_frames().items()
    ):
        time.sleep(STEP)


def _calls_within(frame: FrameType | None) -> int:
    """The number of awaited functions on a stack."""
    found = 0
    while frame is not None:
        found += frame.f_code in _awaited
        frame = frame.f_back
    return found


def _start_over() -> None:
    """Reset the state in a forked child, where the parent's work does not run."""
    global closing, ending, _lock
    closing, ending, _lock = False, False, threading.Lock()
    _batchers.clear()


os.register_at_fork(after_in_child=_start_over)


def answer(future: Future[Any], result: object, error: BaseException | None = None) -> None:
    """Finish a future. Exceptions from its callbacks are logged, because a SystemExit would end the worker's thread."""
    try:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
    except BaseException:
        _log.exception("a future's callback failed")


def _run(call: Callable[[], Any], future: Future[Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            result = call()
        except BaseException as error:
            answer(future, None, error)
        else:
            answer(future, result)


class Workers:
    """At most ``number`` threads, started on demand. They end when this object is closed or dropped."""

    def __init__(self, number: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._threads = threads = set[int]()
        self._pool = ThreadPoolExecutor(number, "perceiver-export", lambda: threads.add(threading.get_ident()))

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Call in a worker thread; at exit, in this thread. At exit, a future from a callback never finishes."""
        future: Future[Any] = Future()
        try:
            self._pool.submit(_run, call, future)
        except RuntimeError:  # Python is shutting down and starts no more calls
            if not self.in_callback():
                _run(call, future)
        return future

    def in_callback(self) -> bool:
        """Whether this thread runs a future's callback, where waiting for another future may never end."""
        return threading.get_ident() in self._threads

    def close(self) -> None:
        """Wait until all submitted calls are done. In a future's callback, return at once; the calls still finish."""
        self._pool.shutdown(wait=not self.in_callback())
