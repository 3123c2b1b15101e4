# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export run`: read files or text, run the bundle's task, show and save the answers."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from perceiver_export.exporter.cli import answers, run_frames, run_text
from perceiver_export.exporter.cli import output as ui
from perceiver_export.exporter.cli.answers import Answers, Progress, Request
from perceiver_export.runtimes.errors import BundleError, UsageError
from perceiver_export.runtimes.preprocessing import TextPreprocessing

if TYPE_CHECKING:
    from perceiver_export.runtimes.manifest import Manifest


class _Runner(NamedTuple):
    """``read`` checks a request and reads its samples, ``answer`` runs the task; -o has this ``ending``."""

    example: str
    read: Callable[[Request], Any]
    answer: Callable[[Any, Any, Request, Progress], Answers]
    ending: str | None = ".json"


_ARRAYS = _Runner("ARRAYS.npz -o OUT.npz", answers.array_file, answers.answer_arrays, ".npz")
RUNNERS = {
    "image-classification": _Runner("IMAGE…", answers.image_files, partial(answers.answer_each, "image")),
    "fill-mask": _Runner("'TEXT WITH [MASK*5]'", partial(run_text.read_texts, by_line=False), run_text.answer_masks),
    "text-classification": _Runner("'TEXT'", partial(run_text.read_texts, by_line=True), run_text.answer_texts),
    "optical-flow": _Runner("FRAME0.png FRAME1.png -o flow.png", run_frames.read_frames, run_frames.answer_flow, None),
    "video-autoencoding": _Runner(
        "FRAMES_DIRECTORY SOUND.wav -o DIRECTORY", run_frames.read_video, run_frames.answer_video, None
    ),
    "audio-classification": _Runner("SOUND.wav", lambda request: request.inputs, answers.answer_sounds),
    "point-cloud-classification": _Runner(
        "POINTS.ply", answers.point_files, partial(answers.answer_each, "point cloud")
    ),
    "sets": _ARRAYS._replace(example="ENTITIES.npz -o OUT.npz"),
    "arrays": _ARRAYS,
}


@ui.options_of(Request)
def run(
    bundle: ui.BundleArgument,
    options: Request,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT",
            help="Images (files or directories), text, .txt or .jsonl, two frames or a directory of them, WAV, "
            ".ply/.xyz/.npy, .npz.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[int | None, typer.Option(help="Labels to show per sample; by default 3.")] = None,
) -> None:
    """Run a bundle on files or text, and print or write its answers."""
    from perceiver_export.runtimes.bundle import open_bundle, read_manifest
    from perceiver_export.runtimes.manifest import judged_output
    from perceiver_export.runtimes.presence import advice_here

    manifest = read_manifest(Path(bundle))
    task = manifest.task
    if task not in RUNNERS:
        raise BundleError(f"{bundle} has the unknown task {task!r}", f"use one of {', '.join(RUNNERS)}")
    judged = judged_output(manifest)
    if top is not None and task != "fill-mask" and (judged is None or judged[1] == "regression"):
        raise UsageError(f"{bundle} has no labels for --top to choose from", "leave --top out")
    if (options.text or options.truncate) and task not in ("fill-mask", "text-classification"):
        raise UsageError(f"{bundle} does {task}, which reads no text", "leave --text and --truncate out")
    if not inputs and not options.text:
        raise UsageError("no input is given", f"give {RUNNERS[task].example}")
    request = replace(options, bundle=bundle, inputs=inputs or ())
    where = run_task(task, request if top is None else replace(request, top=top))
    advised = ui.shows_text() and not where["precision"].endswith(("fp16", "bf16"))
    if advised and (advice := advice_here(open_bundle(bundle, "never"), where["target"], options.threads)):
        ui.say(advice, "note:")


def run_task(task: str, request: Request) -> dict[str, Any]:
    """Read the samples, run the task, save and show its answers. Return what `Runtime.describe` says."""
    from perceiver_export.runtimes.tasks import open_task

    runner, one = RUNNERS[task], request
    if one.output is not None:
        ui.check_output(one.output, (one.bundle, *one.inputs), runner.ending)
    samples = runner.read(request)
    with (
        open_task(one.bundle, one.device, one.threads, "auto", one.check_finite, one.precision, one.truncate) as opened,
        ui.progress_bar("run") as progress,
    ):
        found = runner.answer(opened, samples, request, progress)
        where = found.runtime.describe()
    document = {"runtime": where, **found.document}
    if one.output is not None and found.save is not None:
        found.save(one.output)
    elif one.output is not None and runner.ending == ".json":
        ui.write_json(one.output, document)
    ui.print_json(document)
    version = where["version"].partition("-")[0]  # OpenVINO appends its branch
    title = f"{request.bundle} on {where['engine']} {version}, {where['device']}, {where['precision']}"
    for shown in found.shown:
        if isinstance(shown, ui.Table):
            ui.print_table(*shown._replace(title=shown.title or title))
        else:
            ui.print_text(shown)
    ui.show_written(one.output)
    if found.error is not None:
        raise found.error
    return where


def example_input(manifest: Manifest) -> str:
    """An example of the arguments after `run BUNDLE`, with the mask of the bundle's tokenizer."""
    steps = manifest.preprocessing
    if manifest.task == "fill-mask" and isinstance(steps, TextPreprocessing) and steps.tokenizer:
        return shlex.quote(f"TEXT WITH {steps.tokenizer.mask}")
    return RUNNERS[manifest.task].example if manifest.task in RUNNERS else "INPUT…"
