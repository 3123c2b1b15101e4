# SPDX-License-Identifier: Apache-2.0
"""What is here to run on, and for each thing that is missing the command that brings it."""

from __future__ import annotations

from dataclasses import dataclass

# What each part of the work needs; any of the distributions will do, the first is what we would install.
_NEEDS = (
    ("read picture files", ("pillow",)),
    ("validate", ("scipy",)),
    ("export", ("torch",)),
    ("export", ("onnx",)),
    ("export", ("onnx-ir",)),
    ("export", ("onnxscript",)),
    ("export", ("safetensors",)),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` is the command to type, empty where nothing is missing."""

    what: str
    needed_for: str
    found: str
    fix: str = ""


def doctor() -> tuple[Finding, ...]:
    """Everything that a run, validation or export on this machine depends on."""
    return ()
