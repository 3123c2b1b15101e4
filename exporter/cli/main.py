# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export`: each command is a thin layer over the Python function of the same name.

Only this module turns errors into text and exit codes; docs/reference/errors.md says what each code means.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, cast, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from perceiver_export.exporter.cli import output as ui
from perceiver_export.exporter.cli.demo import demo
from perceiver_export.exporter.cli.engines import bench, build, doctor, lint, profile
from perceiver_export.exporter.cli.export import export, package, presets
from perceiver_export.exporter.cli.export import inspect as inspect_
from perceiver_export.exporter.cli.quantize import quantize
from perceiver_export.exporter.cli.run import run
from perceiver_export.exporter.cli.validate import validate
from perceiver_export.runtimes.errors import PerceiverExportError
from perceiver_export.runtimes.files import is_full

# Groups in the help: commands, and options by name or metavar.
_COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Make a bundle": (export, quantize, build, package),
    "Use it": (run, validate, bench, profile),
    "Find out": (inspect_, lint, doctor, presets, demo),
}
# With --quiet, these print only warnings and the verdict.
_WRITES_ONLY = (export, quantize, build, package, validate, demo)
# Help shows groups and their options in this order.
_OPTIONS = {
    "Data": "data against samples text truncate",
    "Model": "task parity config like use_transformers",
    "Graph": "split latents dynamic_queries batch shape fold memory_budget",
    "Quantization": "scheme NAME=SCHEME method smooth correct_bias weight_bits keep_float min_coverage sensitivity",
    "Gates and certificates": "max_drop min_agreement max_metric_change metric certify allow_overlap sequential seed "
    "plan flips search least_gain for_size",
    "Shards": "shard scores statistics merge",
    "Engine": "target device against_device precision threads hint flag lower_only force",
    "Output": "output overwrite csv_ junit report save_worst top sort layers json quiet",
}
_GROUP_OF = {name: group for group, names in _OPTIONS.items() for name in names.split()}
# Metavars by option name or type; any other option uses its own name.
_VALUES: dict[Any, str] = {int: "N", float: "NUMBER", "device": "TARGET", "against_device": "TARGET"}
_VALUES |= {"max_drop": "POINTS", "min_agreement": "PERCENT", "min_coverage": "PERCENT", "max_metric_change": "CHANGE"}
_NUMBERS = {"int_parsing": "a whole number", "float_parsing": "a number"}  # errors of typer's library
_USAGE_ERROR, _CLICK_ERROR = cast("Any", typer.BadParameter.__mro__[1:3])  # typer has no names for them


class _Help:
    """Help in the usual notation, `BUNDLE [PART.npz...]`; typer would show `{BUNDLE}` and `<list[Path]>`."""

    def get_params(self, context: Any) -> list[Any]:
        """Parameters without the Python type of a flag or an argument."""
        found: list[Any] = super().get_params(context)  # type: ignore[misc]
        for one in found:
            if one.param_type_name == "argument":
                one.display_type_rich = lambda ctx: None
            elif one.is_flag:
                one.metavar = ""
        return found


class _Command(_Help, TyperCommand):
    def collect_usage_pieces(self, context: Any) -> list[str]:
        """Arguments, then [OPTIONS]."""
        named: list[Any] = [one for one in self.params if one.param_type_name == "argument"]
        texts = [f"{one.metavar}{'...' * (one.nargs == -1)}" for one in named]
        return [*(text if one.required else f"[{text}]" for one, text in zip(named, texts, strict=True)), "[OPTIONS]"]

    def parse_args(self, context: Any, given: list[str]) -> list[str]:
        """Refuse a single-value option that is given twice: typer would silently use the last one."""
        completes = context.resilient_parsing
        typed = [] if completes else self.make_parser(context).parse_args(list(given))[2]
        for index, one in enumerate(typed):
            if one in typed[:index] and not (one.multiple or getattr(one, "is_flag", True)):
                raise _USAGE_ERROR(f"{one.opts[0]} is given twice but takes one value", context)
        return super().parse_args(context, given)


class _Group(_Help, TyperGroup):
    pass


app = typer.Typer(
    name="perceiver-export",
    cls=_Group,
    help="Export a Perceiver, any torch module or an ONNX file, and run it on a device without torch.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Add --json, --quiet and groups of options. Report Ctrl-C as an error: typer would exit silently."""

    @functools.wraps(function)
    def run_command(*arguments: Any, quiet: bool, json: bool = False, **options: Any) -> None:
        try:
            with ui.quiet(quiet, quiet and function in _WRITES_ONLY, json):
                function(*arguments, **options)
        except KeyboardInterrupt as error:
            hint = "run the command again; no half-written file was left behind"
            raise PerceiverExportError("interrupted", hint) from error

    signature = inspect.signature(function, eval_str=True)
    flags = {"json": ui.JsonFlag, "quiet": ui.QuietFlag}
    if function is demo:  # it runs other commands
        del flags["json"]
    only = inspect.Parameter.KEYWORD_ONLY
    asked = [inspect.Parameter(name, only, default=False, annotation=flag) for name, flag in flags.items()]
    parameters = [one.replace(kind=only) for one in (*signature.parameters.values(), *asked)]
    parameters.sort(key=lambda one: [*_GROUP_OF].index(one.name) if one.name in _GROUP_OF else -1)
    for one in parameters:
        kind, about = get_args(one.annotation)
        about.rich_help_panel = _GROUP_OF.get(about.metavar) or _GROUP_OF.get(one.name)
        if about.metavar is None:
            about.metavar = _metavar(one.name, kind)
    run_command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run_command.__annotations__ = {one.name: one.annotation for one in parameters}
    return run_command


def _metavar(name: str, kind: Any) -> str:
    """The metavar of an option that sets none; ``kind`` is its type, which may be optional or a list."""
    plain = [one for one in get_args(kind) or (kind,) if one is not type(None)]
    return _VALUES.get(name) or _VALUES.get(plain[0], name.upper().replace("_", "-"))


for group, commands in _COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=group, cls=_Command)(_command(command))


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


class _Warnings(logging.Handler):
    """Print warnings on standard error, for example that an engine is compiled again."""

    def emit(self, record: logging.LogRecord) -> None:
        ui.say(" ".join(record.getMessage().split()), "warning:", err=True)


def main() -> None:
    """Console script: run a command; every error becomes an `error:` and a `hint:`."""
    logging.getLogger("perceiver_export").addHandler(_Warnings(logging.WARNING))
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="perceiver-export", standalone_mode=False))
    except PerceiverExportError as error:
        _fail(error.message, error.hint)
    except _CLICK_ERROR as error:  # wrong usage
        message = _wrong_usage(error)
        context = getattr(error, "ctx", None)  # only errors of usage have one
        path = "perceiver-export" if context is None else context.command_path
        _fail(message[:1].lower() + message[1:], f"see {path} --help", error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output stopped, as `head` does
        sys.exit(1)
    except OSError as error:
        if not is_full(error):
            raise
        with contextlib.suppress(OSError):  # Python would write buffered output again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"the disk is full: {error.filename or 'the output'} was not written", "free some space and try again")


def _wrong_usage(error: Any) -> str:
    """typer's message, except for a value that is not a number: there typer repeats the error of a library."""
    cause: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    wanted = _NUMBERS.get(cause[0]["type"]) if len(cause) == 1 else None
    if wanted is not None:
        return f"{error.param.opts[0]} is {cause[0]['input']!r}, not {wanted}"
    return " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")


def _fail(message: str, hint: str, code: int = 1) -> None:
    ui.say(" ".join(message.split()), "error:", "red", err=True)
    ui.say(" ".join(hint.split()), "hint:", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
