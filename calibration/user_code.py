# SPDX-License-Identifier: Apache-2.0
"""``module:function``: code of the user's own, seen from the directory where the command is typed."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from perceiver_export.runtimes.errors import UsageError


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """As in `python -m`; what was not on the path before is not on it afterwards."""
    if "" in sys.path:
        yield
        return
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have taken it away itself
            sys.path.remove("")


def find_function(spec: str) -> Callable[[], Any]:
    """What ``module:function`` names. Raises UsageError: it cannot be imported, or is not callable."""
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError, ValueError, TypeError) as error:
        raise UsageError(
            f"{spec} cannot be imported: {error}", "give module:function, seen from this directory"
        ) from error
    if not callable(found):
        raise UsageError(f"{spec} is a {type(found).__name__}", "give a function without arguments")
    function: Callable[[], Any] = found
    return function
