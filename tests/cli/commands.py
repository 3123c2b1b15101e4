# SPDX-License-Identifier: Apache-2.0
"""Running `perceiver-export` as a user does: in this process, or, given options of `subprocess.run`, in a new one."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

COMMAND = [sys.executable, "-c", "from perceiver_export.exporter.cli.main import main; main()"]


def perceiver_export(
    *arguments: str | Path, command: list[str] = COMMAND, **options: Any
) -> subprocess.CompletedProcess[str]:
    given = [str(argument) for argument in arguments]
    if options or command is not COMMAND:
        return subprocess.run([*command, *given], capture_output=True, text=True, check=False, **options)
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), _fresh_logging_and_warnings():
        code = _main(given)
    return subprocess.CompletedProcess(given, code, stdout.getvalue(), stderr.getvalue())


def _main(arguments: list[str]) -> int:
    """The exit code that a process would end with."""
    from perceiver_export.exporter.cli.main import main

    with mock.patch.object(sys, "argv", ["perceiver-export", *arguments]):
        try:
            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            return 1
    return 0


@contextlib.contextmanager
def _fresh_logging_and_warnings() -> Any:
    """As a new process has them: pytest makes warnings errors, and handlers would add up."""
    logger = logging.getLogger("perceiver_export")
    before = list(logger.handlers)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        try:
            yield
        finally:
            logger.handlers[:] = before


def succeed(*arguments: str | Path, **options: Any) -> str:
    done = perceiver_export(*arguments, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def unwrapped(text: str) -> str:
    """Lines that were wrapped at 80 columns, each in one."""
    return re.sub(r"(?: \\)?\n {5,}", " ", text)


def fail(*arguments: str | Path, **options: Any) -> str:
    """One error, one hint, nothing else, exit code 1; each in one line."""
    done = perceiver_export(*arguments, **options)
    assert done.returncode == 1, done.stdout
    said = unwrapped(done.stderr)
    error, hint = said.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert len(hint) > 10
    return said
