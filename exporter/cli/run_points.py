# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export run` with a classifier of point clouds: files in, labels out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from perceiver_export.exporter.cli.answers import LabelAnswer, show_labels
from perceiver_export.exporter.cli.files import check_file, text
from perceiver_export.exporter.cli.output import progress_bar
from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.runtimes.errors import InputError

if TYPE_CHECKING:
    from perceiver_export.runtimes.tasks.point_cloud_classification import PointCloudClassification


def run(bundle: str, inputs: list[str], output: Path | None, options: RunOptions) -> None:
    """Labels of .npy, .xyz and ASCII .ply files, or of all that directories hold."""
    files = _files(inputs)
    if output is not None:
        check_file(output)
    answers = list[LabelAnswer]()
    with (
        cast(
            "PointCloudClassification",
            options.open_task(bundle),
        ) as task,
        progress_bar("run", quiet=options.json) as progress,
    ):
        for done, file in enumerate(files):
            progress("run", done, len(files))
            answers.append(LabelAnswer(text(file), task(file, options.top)))
        where = task.runtime.describe()
    show_labels(bundle, "point cloud", answers, where, output, options)


def _files(inputs: list[str]) -> list[Path]:
    from perceiver_export.runtimes.point_files import POINT_FILES

    files: list[Path] = []
    for path in map(Path, inputs):
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in POINT_FILES)
        if not found:
            raise InputError(f"{path} holds no point clouds", f"they end in {', '.join(POINT_FILES)}")
        files += found
    return files
