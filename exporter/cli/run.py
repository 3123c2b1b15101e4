# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export run`: what a bundle does with files or text, by its task."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from perceiver_export.exporter.cli.files import check_output
from perceiver_export.exporter.cli.output import (
    BundleArgument,
    DeviceOption,
    JsonFlag,
    PrecisionOption,
    ThreadsOption,
)
from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.runtimes.errors import BundleError, UsageError

if TYPE_CHECKING:
    from perceiver_export.runtimes.engines.backend import Precision

# Of each task: the module beside this one and its function, and what to give it.
_COMMANDS = {
    "image-classification": ("run_pictures", "run"),
    "fill-mask": ("run_text", "run_fill_mask"),
    "text-classification": ("run_text", "run_classification"),
    "optical-flow": ("run_flow", "run"),
    "video-autoencoding": ("run_video", "run"),
    "audio-classification": ("run_audio", "run"),
    "point-cloud-classification": ("run_points", "run"),
    "sets": ("run_arrays", "run"),
    "arrays": ("run_arrays", "run"),
}
_TOP = 3
_WITHOUT_LABELS = ("optical-flow", "sets", "arrays")
_NO_JSON = (*_WITHOUT_LABELS, "video-autoencoding")  # what -o of these writes, and how it may be called, they know
INPUTS = {
    "image-classification": "PICTURE…",
    "fill-mask": "'TEXT WITH [MASK*5]'",
    "text-classification": "'TEXT'",
    "optical-flow": "FRAME0.png FRAME1.png -o flow.png",
    "video-autoencoding": "FRAMES_DIRECTORY SOUND.wav -o DIRECTORY",
    "audio-classification": "SOUND.wav",
    "point-cloud-classification": "POINTS.ply",
    "sets": "ENTITIES.npz -o OUT.npz",
    "arrays": "ARRAYS.npz -o OUT.npz",
}


def run(
    bundle: BundleArgument,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT…",
            help="Pictures (files or directories), text, two frames or a directory of them, WAV, .ply/.xyz/.npy, .npz.",
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Where answers go: .json, or a picture, arrays, a directory of frames."),
    ] = None,
    top: Annotated[int | None, typer.Option(help="How many labels to show of each.", show_default="3")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    check_finite: Annotated[
        bool, typer.Option("--check-finite", help="Refuse NaN and infinity, in what goes in and in what comes out.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Run a bundle on files, or on text, and print or write what it says."""
    from perceiver_export.runtimes.bundle import read_manifest

    manifest = read_manifest(Path(bundle))
    task = manifest.task
    if task not in _COMMANDS:
        raise BundleError(f"{bundle} is of the unknown task {task!r}", f"this version knows: {', '.join(_COMMANDS)}")
    if top is not None and (task in _WITHOUT_LABELS or (task == "text-classification" and not manifest.labels)):
        raise UsageError(f"{bundle} gives no labels of which --top could be shown", "leave --top out")
    if output is not None:
        check_output(Path(output), (bundle, *inputs), None if task in _NO_JSON else ".json")
    module, function = _COMMANDS[task]
    command = getattr(importlib.import_module(f"perceiver_export.exporter.cli.{module}"), function)
    wish = cast("Precision | None", precision)
    options = RunOptions(_TOP if top is None else top, device, threads, json, check_finite, wish)
    command(bundle, inputs, None if output is None else Path(output), options)
