# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export demo`: the commands of the README on a small trained model."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from perceiver_export.exporter.cli.output import say
from perceiver_export.runtimes.errors import DataError

_EXAMPLE = Path("examples/fashion_mnist")
_DIRECTORY = "perceiver-export-demo"
_STEPS = (
    ("a trained checkpoint becomes a bundle that needs no torch", "export {example}/checkpoint -o {out}/fashion"),
    ("its parts, and where the work is", "inspect {out}/fashion"),
    ("a few images of clothes", "run {out}/fashion {example}/pictures"),
    (
        "int8, calibrated on images held out of training",
        "quantize {out}/fashion --data {example}/held_out.npz -o {out}/fashion-int8",
    ),
    (
        "the 10,000 official test images on every engine that is here, against the fp32 bundle, which export compared "
        "with torch; a certificate for each, and a report with speed and memory",
        "validate {out}/fashion-int8 --data {example}/test.npz --against {out}/fashion --device all --max-drop 0.6 "
        "--min-agreement 97 --certify --report {out}/report.html",
    ),
)


def demo(
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="Where the two bundles and the report go.")
    ] = _DIRECTORY,
    example: Annotated[str | None, typer.Option(help="The folder examples/fashion_mnist of the repository.")] = None,
) -> None:
    """From a checkpoint to a certified int8 bundle, on a small trained model and real images."""
    from perceiver_export.calibration.bundles import check_new_directory
    from perceiver_export.calibration.report.report import check_report_file
    from perceiver_export.exporter.cli.main import app

    folder, directory = _find_example(example), Path(output)
    check_report_file(directory / "report.html")
    if output != _DIRECTORY:
        check_new_directory(directory, "--output", DataError)
    times: list[tuple[str, float]] = []
    for what, words in _STEPS:
        command = [word.format(example=folder, out=directory) for word in words.split()]
        say("")
        say(f"{len(times) + 1}. {command[0]}: {what}")
        say(f"   $ {shlex.join(['perceiver-export', *command])}")
        # In its own directory the demo replaces the bundles of an earlier one.
        replaces = output == _DIRECTORY and command[0] in ("export", "quantize")
        begun = time.monotonic()
        app([*command, *(["--overwrite"] if replaces else [])], standalone_mode=False)
        times.append((command[0], time.monotonic() - begun))
    each = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times)
    say(f"\nThe demo took {sum(seconds for _, seconds in times):.0f} s: {each}.")
    say(f"The certified int8 bundle is {directory / 'fashion-int8'}.")


def _find_example(given: str | None) -> Path:
    """The example's folder: the one ``given``, or that of the repository that this was installed from or runs in."""
    source = Path(__file__).resolve().parents[2]  # an editable install keeps links to the checkout
    candidates = [Path(given)] if given is not None else [_EXAMPLE, source / _EXAMPLE]
    for folder in candidates:
        if (folder / "checkpoint" / "config.json").is_file():
            return folder
    raise DataError(
        f"the demo's model and images are not at {candidates[0]}",
        "run it in a clone of the repository, since they are not in the wheel, or give --example FOLDER",
    )
