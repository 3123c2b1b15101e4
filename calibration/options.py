# SPDX-License-Identifier: Apache-2.0
"""Fields of option dataclasses. The command line makes an option of each, with its documentation as help."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, doc: str, value: str | None = None) -> Any:
    """A field with the help and metavar of its command-line option. If ``default`` is a type, calling it gives one."""
    default = {"default_factory" if isinstance(default, type) else "default": default}
    return field(**default, metadata={"doc": doc, "value": value})
