# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export run` with an audio classifier: recordings in, labels out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from perceiver_export.exporter.cli.answers import LabelAnswer, show_labels
from perceiver_export.exporter.cli.files import check_file, text
from perceiver_export.exporter.cli.output import progress_bar
from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.runtimes.errors import UsageError

if TYPE_CHECKING:
    from perceiver_export.runtimes.tasks.audio_classification import AudioClassification

_NOTE = "each label has its own probability; they do not exclude each other"


def run(bundle: str, inputs: list[str], output: Path | None, options: RunOptions) -> None:
    """Any number of recordings; AUDIO FRAMES in pairs where the model sees video too; FRAMES where it hears nothing.

    A recording is a WAV file, or a spectrogram in a .npy file for a model that takes one.
    """
    if output is not None:
        check_file(output)
    answers = list[LabelAnswer]()
    with (
        cast("AudioClassification", options.open_task(bundle)) as task,
        progress_bar("run", quiet=options.json) as progress,
    ):
        samples = _samples(inputs, task.hears, task.sees)
        for done, (audio, frames) in enumerate(samples):
            progress("run", done, len(samples))
            name = " + ".join(text(given) for given in (audio, frames) if given is not None)
            answers.append(LabelAnswer(name, task(audio, frames, options.top)))
        where = task.runtime.describe()
    show_labels(bundle, "input", answers, where, output, options, _NOTE)


def _samples(inputs: list[str], hears: bool, sees: bool) -> list[tuple[str | None, str | None]]:
    """(audio, frames) of each sample."""
    if hears and sees:
        if len(inputs) % 2:
            raise UsageError(
                f"inputs given: {len(inputs)}, and the model hears and sees",
                "give each recording with the directory of its frames: run BUNDLE sound.wav frames/",
            )
        return list(zip(inputs[::2], inputs[1::2], strict=True))
    return [(name, None) if hears else (None, name) for name in inputs]
