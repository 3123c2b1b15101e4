# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export run` with image classification: pictures in, labels out."""

from __future__ import annotations

from pathlib import Path

from perceiver_export.exporter.cli.answers import show_labels
from perceiver_export.exporter.cli.files import check_file, text
from perceiver_export.exporter.cli.output import progress_bar
from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.runtimes.errors import InputError


def run(bundle: str, inputs: list[str], output: Path | None, options: RunOptions) -> None:
    """The most probable labels of each picture."""
    files = _files(inputs)
    if output is not None:
        check_file(output)
    answers = {}
    with (
        options.open_task(bundle) as task,
        progress_bar("run", quiet=options.json) as progress,
    ):
        for done, file in enumerate(files):
            progress("run", done, len(files))
            answers[text(file)] = task(file, top=options.top)
        where = task.runtime.describe()
    show_labels(bundle, "picture", answers, where, output, options)


def _files(inputs: list[str]) -> list[Path]:
    from perceiver_export.calibration.data import PICTURES

    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not found:
            raise InputError(f"{path} holds no pictures", "give picture files, or a directory of them")
        files += found
    return files
