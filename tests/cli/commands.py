# SPDX-License-Identifier: Apache-2.0
"""Running `perceiver-export` as a user does, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from perceiver_export.exporter.cli.main import main; main()"]


def perceiver_export(
    *arguments: str | Path, command: list[str] = COMMAND, **options: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False, **options)


def succeed(*arguments: str | Path, **options: Any) -> str:
    done = perceiver_export(*arguments, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def fail(*arguments: str | Path, **options: Any) -> str:
    """One error line, one hint line, nothing else, exit code 1."""
    done = perceiver_export(*arguments, **options)
    assert done.returncode == 1, done.stdout
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert len(hint) > 10
    return done.stderr
