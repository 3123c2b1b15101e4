# SPDX-License-Identifier: Apache-2.0
"""The package: `exporter`, `calibration` and `runtimes`; importing it imports none of them."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    """``__version__``, read from the installed package when it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("perceiver-export")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
