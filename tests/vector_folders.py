# SPDX-License-Identifier: Apache-2.0
"""Where DeepMind's reference values lie: `tests/vectors`, and folders that PERCEIVER_VECTORS names.

The environment variable holds paths with the path separator between them; their folders may be nested as one likes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).resolve().parent / "vectors"


def vector_folders(file: str) -> list[Path]:
    """Every folder that holds a file of this name, those of `tests/vectors` first; there is one at least."""
    further = [Path(name) for name in os.environ.get("PERCEIVER_VECTORS", "").split(os.pathsep) if name]
    for root in further:
        assert root.is_dir(), f"PERCEIVER_VECTORS names {root}, which is not a folder"
    found = [path.parent for root in (VECTORS, *further) for path in sorted(root.rglob(file))]
    assert found, f"no folder of vectors holds {file}"
    return found


def function_cases(group: str) -> list[tuple[Path, str, dict[str, Any]]]:
    """Every case of one of DeepMind's functions: its folder, its name, and what cases.json says of it."""
    found = []
    for folder in vector_folders("cases.json"):
        cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]
        found += [(folder, name, case) for name, case in cases.items() if name.split("/")[0] == group]
    assert found
    return found


def model_folders(name: str) -> list[Path]:
    """Every folder of a reference model of this name, as its config.json says."""
    folders = vector_folders("config.json")
    return [folder for folder in folders if json.loads((folder / "config.json").read_text("utf-8"))["name"] == name]
