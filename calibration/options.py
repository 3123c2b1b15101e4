# SPDX-License-Identifier: Apache-2.0
"""Fields of dataclasses of options: the command line makes an option of each, with its documentation as help."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, doc: str, value: str | None = None) -> Any:
    """A field with the help and the metavar of the command line's option; a type as ``default`` makes the default."""
    default = {"default_factory" if isinstance(default, type) else "default": default}
    return field(**default, metadata={"doc": doc, "value": value})
