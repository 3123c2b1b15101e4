# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C during a call of a compiler, which in its callbacks would swallow it, or end the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_STEP = 0.2  # seconds


def interruptible(work: Callable[[threading.Event], T], stopping: Callable[[], None]) -> T:
    """Work in a thread of its own, so that Ctrl-C arrives here; the first one sets the event that work is given.

    Work that does not look at it is waited for. ``stopping`` is called meanwhile.

    Raises KeyboardInterrupt, once work has stopped; what work raises.
    """
    stop, finished = threading.Event(), threading.Event()
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work(stop))
        except Exception as error:
            errors.append(error)
        finally:
            finished.set()

    thread = threading.Thread(target=run, name="interruptible")
    with _ctrl_c_sets(stop):
        thread.start()
        while not finished.wait(_STEP) and not stop.is_set():
            pass
        if stop.is_set():
            stopping()
        thread.join()
    if stop.is_set():
        raise KeyboardInterrupt
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _ctrl_c_sets(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C sets ``stop``; raised where the main thread happens to be, it could leave the compiler running behind."""
    heard = threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, lambda *_: stop.set()) if heard else None
    try:
        yield
    finally:
        if heard:
            signal.signal(signal.SIGINT, before)
