# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export demo`: the commands of the README on the small trained models of `examples/`."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from perceiver_export.exporter.cli.output import print_table, say
from perceiver_export.runtimes.errors import DataError

_DIRECTORY = "perceiver-export-demo"


def demo(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="An example that --list shows, or the folder of one.")
    ] = "fashion_mnist",
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="Where the bundles and the report go.")
    ] = _DIRECTORY,
    listed: Annotated[bool, typer.Option("--list", help="Show the examples.")] = False,
) -> None:
    """From a checkpoint to a certified int8 bundle, on a small trained model and real data."""
    from perceiver_export.calibration.bundles import check_new_directory
    from perceiver_export.calibration.report.report import check_report_file
    from perceiver_export.exporter.cli.main import app

    if listed:
        rows = [(folder.name, read_example(folder)["shows"]) for folder in find_examples()]
        print_table("examples, for `perceiver-export demo NAME`", ["name", "shows"], rows)
        return
    folder, directory = _find_example(name), Path(output)
    check_report_file(directory / "report.html")
    if output != _DIRECTORY:
        check_new_directory(directory, "--output", DataError)
    sys.path.append(str(folder.resolve().parents[1]))  # of sources such as examples.NAME.model:function
    example = read_example(folder)
    times: list[tuple[str, float]] = []
    for step in example["steps"]:
        command = step_command(step, folder, directory)
        say("")
        say(f"{len(times) + 1}. {command[0]}: {step['what']}")
        say(f"   $ {shlex.join(['perceiver-export', *command])}")
        if output == _DIRECTORY and "-o" in command:  # what an earlier demo wrote here is replaced
            shutil.rmtree(command[command.index("-o") + 1], ignore_errors=True)
        begun = time.monotonic()
        app(command, standalone_mode=False)
        times.append((command[0], time.monotonic() - begun))
    each = ", ".join(f"{command} {seconds:.0f} s" for command, seconds in times)
    say(f"\nThe demo took {sum(seconds for _, seconds in times):.0f} s: {each}.")
    say(f"The certified int8 bundle is {directory / example['quantized']}.")


def step_command(step: dict[str, str], example: Path, out: Path) -> list[str]:
    """The words of a step's command, with the folders in place of {example} and {out}."""
    return [word.format(example=example, out=out) for word in shlex.split(step["command"])]


def read_example(folder: Path) -> dict[str, Any]:
    """The example's demo.json: what it shows, its steps, names of bundles, data and gates."""
    found: dict[str, Any] = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    return found


def find_examples() -> list[Path]:
    """The examples of the repository that this was installed from or runs in, by name."""
    source = Path(__file__).resolve().parents[2]  # an editable install keeps links to the checkout
    each = (sorted(file.parent for file in root.glob("examples/*/demo.json")) for root in (Path(), source))
    return next(filter(None, each), [])


def _find_example(name: str) -> Path:
    """Its folder. Raises DataError if there is none of that name."""
    examples = {folder.name: folder for folder in find_examples()}
    folder = Path(name) if (Path(name) / "demo.json").is_file() else examples.get(name)
    if folder is None:
        place = f"it is one of {', '.join(examples)}" if examples else "run it in a clone of the repository"
        raise DataError(f"there is no example {name}", f"{place}; the examples are not in the wheel")
    return folder
