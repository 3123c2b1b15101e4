# SPDX-License-Identifier: Apache-2.0
"""Flags are settings of an engine's library, from ``--flag`` and engine.json. The libraries' telemetry is off.

engine.json travels with a bundle, so only the settings listed here reach a library. None of them names a file or a
library, because other settings write profiles, dumps and caches to any path, or load code.

onnxruntime (since 1.29, also on Linux) writes a device id and a database of events to the user's cache directory and
sends them to Microsoft. OpenVINO writes an id to ~/intel and sends an event to Google Analytics on import. Neither asks
first. An app that wants telemetry sets ORT_DISABLE_TELEMETRY=0, or imports openvino before this package.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from perceiver_export.runtimes.errors import UsageError


class Values(NamedTuple):
    """The values that a flag accepts, as a regular expression for the whole value and in words."""

    pattern: str
    words: str


Flags = Mapping[str, Values]


def one_of(*values: str) -> Values:
    """One of these words."""
    return Values("|".join(map(re.escape, values)), ", ".join(values[:-1]) + f" or {values[-1]}")


NUMBER = Values(r"[0-9]{1,9}", "a whole number of up to 9 digits")
MICROSECONDS = Values(r"[0-9]{1,6}", "microseconds, less than a second")
BIT = one_of("0", "1")
YES_NO = one_of("YES", "NO")


def flag_problem(name: str, value: object, allowed: Flags) -> str:
    """Why a flag is not passed to the library; empty if it is."""
    if name not in allowed:
        return f"unknown flag {str(name)[:80]!r}; the flags are {', '.join(allowed) or 'none'}"
    if not isinstance(value, str) or not re.fullmatch(allowed[name].pattern, value):
        return f"the value of the flag {name}={str(value)[:80]!r} is not allowed; it must be {allowed[name].words}"
    return ""


def check_flags(target: str, flags: Mapping[str, str], allowed: Flags) -> None:
    """Raise UsageError if the target does not accept a flag or its value."""
    for name, value in flags.items():
        if problem := flag_problem(name, value, allowed):
            raise UsageError(f"{target}: {problem}", "correct --flag, or omit it")


_OPENVINO = "openvino_telemetry"


def check_onnxruntimes(onnxruntime: Any) -> None:
    """Disable telemetry events even if an app imported onnxruntime before this package."""
    if os.environ.get("ORT_DISABLE_TELEMETRY") == "1":
        onnxruntime.disable_telemetry_events()


@contextmanager
def without_openvinos() -> Iterator[None]:
    """Hide openvino's telemetry package while openvino is imported, as if it were not installed.

    The documented switch (`opt_in_out --opt_out`) writes a file to the user's home, which only the user should do.
    """
    if _OPENVINO in sys.modules:
        yield
        return
    sys.modules[_OPENVINO] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(_OPENVINO, None)
