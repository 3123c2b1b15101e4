# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export run` with image classification: pictures in, labels out."""

from __future__ import annotations

from pathlib import Path

from perceiver_export.exporter.cli.answers import LabelAnswer, show_labels
from perceiver_export.exporter.cli.files import check_file, text
from perceiver_export.exporter.cli.output import progress_bar
from perceiver_export.exporter.cli.run_options import RunOptions


def run(bundle: str, inputs: list[str], output: Path | None, options: RunOptions) -> None:
    """The most probable labels of each picture."""
    files = _files(inputs)
    if output is not None:
        check_file(output)
    answers = list[LabelAnswer]()
    with (
        options.open_task(bundle) as task,
        progress_bar("run", quiet=options.json) as progress,
    ):
        for done, file in enumerate(files):
            progress("run", done, len(files))
            answers.append(LabelAnswer(text(file), task(file, top=options.top)))
        where = task.runtime.describe()
    show_labels(bundle, "picture", answers, where, output, options)


def _files(inputs: list[str]) -> list[Path]:
    from perceiver_export.runtimes.pictures import picture_files

    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        files += picture_files(path) if path.is_dir() else [path]
    return files
