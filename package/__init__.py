# SPDX-License-Identifier: Apache-2.0
"""The package: `exporter`, `calibration` and `runtimes`. Importing it imports none of them."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    """Look up ``__version__`` in the installed package's metadata."""
    if name == "__version__":
        from importlib.metadata import version

        return version("perceiver-export")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
