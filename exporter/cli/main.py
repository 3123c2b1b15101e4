# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export`: each command is a thin layer over the Python function of the same name.

Only this module turns errors into text and exit codes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer

from perceiver_export.exporter.cli.demo import demo
from perceiver_export.exporter.cli.engines import bench, build, doctor, lint, profile
from perceiver_export.exporter.cli.export import export, inspect, package, presets
from perceiver_export.exporter.cli.quantize import quantize
from perceiver_export.exporter.cli.run import run
from perceiver_export.exporter.cli.validate import validate
from perceiver_export.runtimes.errors import PerceiverExportError, printable
from perceiver_export.runtimes.files import is_full

_P = ParamSpec("_P")
EXIT_CODES = {
    0: "The command did what it was asked, and every gate passed.",
    1: "An error, or a gate that did not pass. Standard error has one `error:` line and one `hint:` line.",
    2: "Wrong usage: an option or argument that does not exist, or with a value of the wrong type.",
}

app = typer.Typer(
    name="perceiver-export",
    help="Takes a trained Perceiver IO and runs it on a device, verified, without torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _interruptible(command: Callable[_P, None]) -> Callable[_P, None]:
    """Ctrl-C as one of our errors; typer would exit with 130, silently."""

    @functools.wraps(command)
    def run_command(*arguments: _P.args, **options: _P.kwargs) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt as error:
            raise PerceiverExportError(
                "interrupted", "nothing was left half-written; type the command again"
            ) from error

    return run_command


for command in (export, quantize, build, run, validate, bench, profile, package, inspect, lint, doctor, presets, demo):
    app.command()(_interruptible(command))


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"perceiver-export {version('perceiver-export')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Console script: run a command; our errors become one `error:` and one `hint:` line."""
    if logging.lastResort is not None:  # warnings, such as of an engine that is compiled again, on standard error
        logging.getLogger("perceiver_export").addHandler(logging.lastResort)
    try:
        app()
    except PerceiverExportError as error:
        _complain(error.message, error.hint)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output stopped, as `head` does
        sys.exit(1)
    except OSError as error:
        if not is_full(error):
            raise
        with contextlib.suppress(OSError):  # Python would write buffered output again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _complain(
            f"the disk is full: {error.filename or 'the output'} was not written", "free some space and try again"
        )
        sys.exit(1)


def _complain(message: str, hint: str) -> None:
    one_line = " ".join(message.split())
    typer.echo(typer.style("error:", fg="red", bold=True) + f" {printable(one_line)}", err=True)
    typer.echo(typer.style("hint:", fg="yellow", bold=True) + f" {printable(' '.join(hint.split()))}", err=True)


if __name__ == "__main__":
    main()
