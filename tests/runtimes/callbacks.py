# SPDX-License-Identifier: Apache-2.0
"""Calls that are made in a future's callback."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def in_callback(future: Future[Any], call: Callable[[], T]) -> Future[T]:
    """The outcome of ``call``. Where the future is done already, it is made here."""
    outcome: Future[T] = Future()

    def run(_: Future[Any]) -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    future.add_done_callback(run)
    return outcome
