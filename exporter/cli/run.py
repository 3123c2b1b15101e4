# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export run`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perceiver_export.exporter.cli.output import (
    BundleArgument,
    DeviceOption,
    JsonFlag,
    ThreadsOption,
    print_json,
    print_table,
    progress_bar,
)
from perceiver_export.runtimes.errors import InputError

if TYPE_CHECKING:
    from perceiver_export.runtimes.tasks.image_classification import Prediction


def run(
    bundle: BundleArgument,
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT…", help="Picture files, or directories of them.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Write the answers as JSON to this file.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many labels to show of each.")] = 3,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Run a bundle on files and print what it says."""
    from perceiver_export.runtimes.tasks import open_task

    files = _files(inputs)
    if output is not None and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise InputError(f"{output} cannot be written: it is a directory, or its folder is not there", "give -o a file")
    answers = {}
    with open_task(bundle, device, threads) as task, progress_bar("run", quiet=json) as progress:
        for done, file in enumerate(files):
            progress("run", done, len(files))
            answers[os.fsencode(file).decode(errors="replace")] = task(file, top=top)
        where = task.runtime.describe()
    document = {"runtime": where, "answers": answers}
    if output is not None:
        _write(Path(output), document)
    if json:
        print_json(document)
        return
    rows = [(file, *(_shown(prediction) for prediction in predictions)) for file, predictions in answers.items()]
    ranks = [f"{rank + 1}." for rank in range(max(len(row) for row in rows) - 1)]
    print_table(f"{bundle} on {where['engine']} {where['version']}, {where['device']}", ["picture", *ranks], rows)


def _files(inputs: list[str]) -> list[Path]:
    from perceiver_export.calibration.data import PICTURES

    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not found:
            raise InputError(f"{path} holds no pictures", "give picture files, or a directory of them")
        files += found
    return files


def _shown(prediction: Prediction) -> str:
    return f"{prediction.label}  {prediction.probability:.1%}"


def _write(path: Path, document: object) -> None:
    import msgspec

    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path} cannot be written: {error.strerror}", "choose another file with -o") from error
