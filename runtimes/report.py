# SPDX-License-Identifier: Apache-2.0
"""report.json: what was measured of a bundle, by whom and where. It grows later, so the manifest does not hash it."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.runtimes.errors import BundleError
from perceiver_export.runtimes.machine import cpu_name

_FILE = "report.json"


def read_report(bundle: Path) -> dict[str, Any]:
    """The report by section; empty where there is none. Raises BundleError where it is damaged."""
    try:
        return msgspec.json.decode((bundle / _FILE).read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{bundle / _FILE} cannot be read: {error}", "remove it; what it said is measured again"
        ) from error


def update_report(bundle: Path, section: str, content: Any) -> None:
    """Replace one section, whole or not at all. Raises BundleError: damaged, or the bundle cannot be written."""
    report = {**read_report(bundle), section: msgspec.to_builtins(content)}
    temporary = bundle / f".{_FILE}.{secrets.token_hex(4)}.partial"
    try:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        os.replace(temporary, bundle / _FILE)
    except OSError as error:
        with contextlib.suppress(OSError):  # of a read-only file system nothing is removed either
            temporary.unlink()
        raise BundleError(
            f"{bundle / _FILE} cannot be written: {error.strerror or error}", "is the bundle read-only?"
        ) from error


def median_latency(bundle: Path, target: str) -> float | None:
    """Milliseconds of one call on this very CPU, as `bench --save` measured them; None where nobody did."""
    try:
        measured = read_report(bundle).get("bench", {}).get(cpu_name(), {}).get(target, {}).get("p50")
    except (BundleError, AttributeError):
        return None
    return measured if isinstance(measured, float) else None
