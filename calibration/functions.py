# SPDX-License-Identifier: Apache-2.0
"""``module:function`` as it is typed on a command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from perceiver_export.runtimes.errors import UsageError


def import_function(spec: str) -> Callable[..., Any]:
    """The function, with modules of the current directory in sight. Raises UsageError."""
    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's module lies where the command is typed
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise UsageError(
            f"{spec} cannot be imported: {error}", "give module:function, seen from this directory"
        ) from error
    if not callable(function):
        raise UsageError(f"{spec} is a {type(function).__name__}", "give a function")
    return function  # type: ignore[no-any-return]
