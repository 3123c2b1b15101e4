# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export`: one file a command beside this one, each a skin over the Python call of the same name.

This is the only place that turns errors into text and exit codes: 0 done and gates held, 1 not, 2 usage.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer

from perceiver_export.exporter.cli.bench import bench
from perceiver_export.exporter.cli.build import build
from perceiver_export.exporter.cli.demo import demo
from perceiver_export.exporter.cli.doctor import doctor
from perceiver_export.exporter.cli.export import export
from perceiver_export.exporter.cli.inspect import inspect
from perceiver_export.exporter.cli.lint import lint
from perceiver_export.exporter.cli.package import package
from perceiver_export.exporter.cli.presets import presets
from perceiver_export.exporter.cli.quantize import quantize
from perceiver_export.exporter.cli.run import run
from perceiver_export.exporter.cli.validate import validate
from perceiver_export.runtimes.errors import PerceiverExportError

_P = ParamSpec("_P")

app = typer.Typer(
    name="perceiver-export",
    help="Takes a trained Perceiver IO and makes it run on a device, verified, without torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _interruptible(command: Callable[_P, None]) -> Callable[_P, None]:
    """Ctrl-C as one of our errors; typer would exit with 130 and say nothing of what became of the work."""

    @functools.wraps(command)
    def run_command(*arguments: _P.args, **options: _P.kwargs) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt as error:
            raise PerceiverExportError(
                "interrupted", "nothing was left half-written; type the command again"
            ) from error

    return run_command


for command in (export, quantize, build, run, validate, bench, package, inspect, lint, doctor, presets, demo):
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
    try:
        app()
    except PerceiverExportError as error:
        _complain(error.message, error.hint)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away, as `head` does
        sys.exit(1)


def _complain(message: str, hint: str) -> None:
    one_line = " ".join(message.split())
    typer.echo(typer.style("error:", fg="red", bold=True) + f" {one_line}", err=True)
    typer.echo(typer.style("hint:", fg="yellow", bold=True) + f" {' '.join(hint.split())}", err=True)


if __name__ == "__main__":
    main()
