# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export demo`: the commands of the README on the small trained models of `examples/`."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from perceiver_export.exporter.cli.output import print_table, say
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.files import parsing, read_json

_DIRECTORY = "perceiver-export-demo"
_NOT_INSTALLED = "run it in a clone of the repository; they are not in the wheel"


class Step(msgspec.Struct, frozen=True):
    """A command and its explanation."""

    what: str
    command: str


class Example(msgspec.Struct, frozen=True):
    """demo.json: what the example shows, its steps, its bundles and data by name, and the gates for benchmarks."""

    shows: str
    steps: tuple[Step, ...]
    bundle: str
    quantized: str
    calibration: str
    test: str
    gates: str


def demo(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="An example that --list shows, or its folder.")
    ] = "fashion_mnist",
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="Where to write the bundles and the report.")
    ] = _DIRECTORY,
    listed: Annotated[bool, typer.Option("--list", help="List the examples.")] = False,
) -> None:
    """Go from a checkpoint to a certified int8 bundle, with a small trained model and real data."""
    from perceiver_export.calibration.bundles import check_new_directory
    from perceiver_export.calibration.report.report import check_report_file
    from perceiver_export.exporter.cli.main import app

    if listed:
        rows = [(folder.name, read_example(folder).shows) for folder in find_examples()]
        if not rows:
            raise DataError("there are no examples here", _NOT_INSTALLED)
        print_table("examples, for `perceiver-export demo NAME`", ["name", "shows"], rows)
        return
    folder, directory = _find_example(name), Path(output)
    example = read_example(folder)
    check_report_file(directory / "report.html")
    if output != _DIRECTORY:
        check_new_directory(directory, "--output", DataError)
    sys.path.append(str(folder.resolve().parents[1]))  # for sources such as examples.NAME.model:function
    times: list[tuple[str, float]] = []
    for step in example.steps:
        command = step_command(step, folder, directory)
        say("")
        say(f"{len(times) + 1}. {command[0]}: {step.what}")
        say(f"   $ {shlex.join(['perceiver-export', *command])}")
        made = Path(dict(pairwise(command)).get("-o", ""))
        if output == _DIRECTORY and directory.resolve() in made.resolve().parents:
            shutil.rmtree(made, ignore_errors=True)  # an earlier demo wrote it
        begun = time.monotonic()
        app(command, standalone_mode=False)
        times.append((command[0], time.monotonic() - begun))
    each = ", ".join(f"{command} {seconds:.0f} s" for command, seconds in times)
    say(f"\nThe demo took {sum(seconds for _, seconds in times):.0f} s: {each}.")
    say(f"The certified int8 bundle is {directory / example.quantized}.")


def step_command(step: Step, example: Path, out: Path) -> list[str]:
    """The words of a step's command, with the folders in place of {example} and {out}."""
    words = (word.replace("{example}", str(example)) for word in shlex.split(step.command))
    return [word.replace("{out}", str(out)) for word in words]


def read_example(folder: Path) -> Example:
    """The example's demo.json. Raises DataError."""
    file, hint = folder / "demo.json", "compare it with the demo.json of another example"
    example = read_json(file, Example, DataError, hint)
    with parsing(str(file), "has a step without a valid command", hint, DataError):
        if not all(shlex.split(step.command) for step in example.steps):
            raise ValueError("a command is empty")
    return example


def find_examples() -> list[Path]:
    """The examples of the repository that this package was installed from or runs in, by name."""
    source = Path(__file__).resolve().parents[2]  # an editable install keeps links to the checkout
    each = (sorted(file.parent for file in root.glob("examples/*/demo.json")) for root in (Path(), source))
    return next(filter(None, each), [])


def _find_example(name: str) -> Path:
    """The example's folder. Raises DataError if no example has that name."""
    examples = {folder.name: folder for folder in find_examples()}
    folder = Path(name) if (Path(name) / "demo.json").is_file() else examples.get(name)
    if folder is None:
        hint = f"choose one of {', '.join(examples)}" if examples else _NOT_INSTALLED
        raise DataError(f"there is no example {name}", hint)
    return folder
