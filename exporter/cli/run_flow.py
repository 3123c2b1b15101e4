# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export run` with optical flow: pictures in, how they move out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from perceiver_export.calibration.directories import check_new_directory, new_directory
from perceiver_export.exporter.cli.answers import title
from perceiver_export.exporter.cli.files import check_file, text
from perceiver_export.exporter.cli.output import print_json, print_table, progress_bar
from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.runtimes.errors import InputError, UsageError

if TYPE_CHECKING:
    from perceiver_export.runtimes.flow_tiles import Flow
    from perceiver_export.runtimes.tasks.optical_flow import OpticalFlow

_DIRECTIONS = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")
_STILL = 0.05  # pixels on average; less is called no motion


@dataclass(frozen=True)
class Motion:
    """How the pixels of one frame move until the next, in pixels; y counts down."""

    frames: tuple[str, str]
    height: int
    width: int
    mean: float
    max: float
    mean_x: float
    mean_y: float
    direction: str
    files: tuple[str, ...]


def run(bundle: str, inputs: list[str], output: Path | None, options: RunOptions) -> None:
    """Flow from each frame to the next, as files where ``output`` says so, and a line about each."""
    from perceiver_export.runtimes.flow_files import write_flow

    frames = _frames(inputs)
    targets = _targets(frames, output)
    motions = []
    with (
        new_directory(output, "-o", InputError)
        if output is not None and _is_directory(output)
        else nullcontext() as folder,
        cast("OpticalFlow", options.open_task(bundle)) as task,
        progress_bar("flow", quiet=options.json) as progress,
    ):
        named = f"{frames[0].name} → {frames[1].name}"
        # The callback reads `named` at each call, and the loop below moves it on.
        flows = task.frames(frames, lambda done, total: progress(named, done, total))
        for number, flow in enumerate(flows):
            for target in targets[number]:
                write_flow(target if folder is None else folder / target.name, flow)
            first, second = map(text, frames[number : number + 2])
            motions.append(summarize((first, second), flow, [text(target) for target in targets[number]]))
            named = " → ".join(frame.name for frame in frames[number + 1 : number + 3])
        where = task.runtime.describe()
    if options.json:
        print_json({"runtime": where, "pairs": [asdict(motion) for motion in motions]})
        return
    _print(title(bundle, where), motions, output)


def summarize(frames: tuple[str, str], flow: Flow, files: Sequence[str] = ()) -> Motion:
    """Lengths and direction of a flow (H, W, 2)."""
    import numpy as np

    lengths = np.hypot(flow[..., 0], flow[..., 1])
    x, y = (float(value) for value in flow.mean(axis=(0, 1), dtype=np.float64))
    mean = float(lengths.mean(dtype=np.float64))
    height, width = flow.shape[:2]
    return Motion(frames, height, width, mean, float(lengths.max()), x, y, _direction(x, y, mean), tuple(files))


def _direction(x: float, y: float, mean: float) -> str:
    """In words: where the mean vector points, if the pixels move together at all."""
    import math

    if not math.isfinite(mean):
        return "not a number"
    if mean < _STILL:
        return "still"
    # Half as long as the pixels move on average: they go to different sides, as in a zoom.
    if math.hypot(x, y) < 0.5 * mean:
        return "mixed"
    return _DIRECTIONS[round(math.atan2(y, x) / (math.pi / 4)) % 8]


def _frames(inputs: Sequence[str]) -> list[Path]:
    """The frames in order: those of one directory, or those named."""
    from perceiver_export.runtimes.pictures import picture_files

    paths = [Path(name) for name in inputs]
    directories = [path for path in paths if path.is_dir()]
    if directories and len(paths) > 1:
        raise InputError(f"{directories[0]} is a directory", "give one directory of frames, or two or more pictures")
    frames = picture_files(paths[0]) if directories else paths
    if len(frames) < 2:
        raise InputError(
            f"there is one frame, {frames[0]}", "flow needs two pictures of the same size, or a directory of frames"
        )
    return frames


def _targets(frames: Sequence[Path], output: Path | None) -> list[list[Path]]:
    """The files to write for each pair; checked before the model runs for minutes."""
    from perceiver_export.runtimes.flow_files import check_format

    pairs = len(frames) - 1
    if output is None:
        return [[] for _ in range(pairs)]
    if _is_directory(output):
        return _targets_in(output, frames[:-1])
    check_format(output)
    if pairs > 1:
        raise UsageError(f"{output} is one file, there are {pairs} flows", "give -o a directory, it is made if needed")
    check_file(output)
    if any(output.absolute() == frame.absolute() for frame in frames):
        raise UsageError(f"{output} is one of the frames", "give -o another file")
    return [[output]]


def _is_directory(output: Path) -> bool:
    """Whether the flows go into a directory; else all of ``output`` is one file."""
    return output.is_dir() or not output.suffix


def _targets_in(directory: Path, frames: Sequence[Path]) -> list[list[Path]]:
    """NAME.flo and NAME.png for each first frame."""
    check_new_directory(directory, "-o", InputError)
    stems = [frame.stem for frame in frames]
    if len(set(stems)) < len(stems):
        stems = [f"{number:05}_{stem}" for number, stem in enumerate(stems)]
    return [[directory / f"{stem}.flo", directory / f"{stem}.png"] for stem in stems]


def _print(heading: str, motions: Sequence[Motion], output: Path | None) -> None:
    paths = {path for motion in motions for path in motion.frames}
    # Frames of different folders may have one name.
    unique = len({os.path.basename(path) for path in paths}) == len(paths)
    rows: list[tuple[str, ...]] = [
        (
            *(os.path.basename(path) if unique else path for path in motion.frames),
            f"{motion.mean:.2f}",
            f"{motion.max:.2f}",
            motion.direction,
        )
        for motion in motions
    ]
    if output is None:
        note = "not written; -o flow.flo, flow.npy or flow.png (a picture) writes one flow, -o DIRECTORY one or many"
    else:
        written = [file for motion in motions for file in motion.files]
        note = f"written: {written[0] if len(written) == 1 else f'{len(written)} files in {text(output)}'}"
    print_table(heading, ["frame", "next frame", "mean px>", "max px>", "direction"], rows, note)
