# SPDX-License-Identifier: Apache-2.0
"""`run` with frames: optical flow (images in, motion out), and video autoencoding (frames and sound reconstructed and
labelled).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_export.calibration.bundles import check_new_directory, new_directory
from perceiver_export.exporter.cli.answers import Answers, Progress, Request, described, short_names
from perceiver_export.exporter.cli.output import Table, check_file
from perceiver_export.runtimes.errors import InputError, UsageError, require
from perceiver_export.runtimes.files import readable

if TYPE_CHECKING:
    from perceiver_export.runtimes.tasks.flow import Flow
    from perceiver_export.runtimes.tasks.video import Reconstruction

_DIRECTIONS = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")
_STILL = 0.05  # mean pixels; less counts as no motion


def read_frames(request: Request) -> tuple[list[Path], list[list[Path]]]:
    """The frames, in order of one directory or as named, and the files to write for each pair."""
    from perceiver_export.runtimes.tasks.image_files import list_images

    paths = [Path(name) for name in request.inputs]
    directories = [path for path in paths if path.is_dir()]
    if directories and len(paths) > 1:
        raise InputError(f"{directories[0]} is a directory", "give one directory of frames, or two or more images")
    frames = list_images(paths[0]) if directories else paths
    if len(frames) < 2:
        hint = "give two images of the same size, or a directory of frames"
        raise InputError(f"{frames[0]} is one frame", hint)
    return frames, _targets(frames, request.output)


def _targets(frames: Sequence[Path], output: Path | None) -> list[list[Path]]:
    from perceiver_export.runtimes.tasks.flow_files import check_format

    pairs = len(frames) - 1
    if output is None:
        return [[] for _ in range(pairs)]
    if _is_directory(output):
        check_new_directory(output, "-o", InputError)
        stems = [frame.stem for frame in frames[:-1]]
        if len(set(stems)) < len(stems):
            stems = [f"{number:05}_{stem}" for number, stem in enumerate(stems)]
        return [[output / f"{stem}.flo", output / f"{stem}.png"] for stem in stems]
    check_format(output)
    if pairs > 1:
        hint = "give -o a directory, which is created if needed"
        raise UsageError(f"{output} is one file, but there are {pairs} flows", hint)
    check_file(output)
    return [[output]]


def _is_directory(output: Path) -> bool:
    """Whether to write the flows to a directory, not to one file."""
    return output.is_dir() or not output.suffix


def answer_flow(task: Any, given: tuple[list[Path], list[list[Path]]], request: Request, progress: Progress) -> Answers:
    """The flow from each frame to the next, written one by one, and a row about each."""
    from perceiver_export.runtimes.tasks.flow_files import write_flow

    frames, targets = given
    output, motions, number = request.output, list[dict[str, Any]](), 0
    with (
        new_directory(output, "-o", InputError) if output is not None and _is_directory(output) else nullcontext()
    ) as folder:
        # The callback reads `number`, which the loop advances.
        flows = task.frames(
            frames, lambda done, total: progress(f"{frames[number].name} → {frames[number + 1].name}", done, total)
        )
        for number, flow in enumerate(flows):
            for target in targets[number]:
                write_flow(target if folder is None else folder / target.name, flow)
            pair = [readable(frame) for frame in frames[number : number + 2]]
            motions.append({"frames": pair, **summarize(flow), "files": list(map(readable, targets[number]))})
    return Answers(task.runtime, {"pairs": motions}, [_motion_table(motions, output)])


def summarize(flow: Flow) -> dict[str, Any]:
    """Size, lengths and direction of a flow (H, W, 2), in pixels; y points down."""
    import numpy as np

    lengths = np.hypot(flow[..., 0], flow[..., 1])
    x, y = (float(value) for value in flow.mean(axis=(0, 1), dtype=np.float64))
    mean = float(lengths.mean(dtype=np.float64))
    found = {"height": flow.shape[0], "width": flow.shape[1], "mean": mean, "max": float(lengths.max())}
    return {**found, "mean_x": x, "mean_y": y, "direction": _direction(x, y, mean)}


def _direction(x: float, y: float, mean: float) -> str:
    """The direction of the mean vector in words, if the pixels move together at all."""
    if not math.isfinite(mean):
        return "not a number"
    if mean < _STILL:
        return "still"
    # Shorter than half of the mean length: pixels move in different directions, as in a zoom.
    if math.hypot(x, y) < 0.5 * mean:
        return "mixed"
    return _DIRECTIONS[round(math.atan2(y, x) / (math.pi / 4)) % 8]


def _motion_table(motions: Sequence[dict[str, Any]], output: Path | None) -> Table:
    names = short_names([path for one in motions for path in one["frames"]])
    rows = [
        (*(names[path] for path in one["frames"]), f"{one['mean']:.2f}", f"{one['max']:.2f}", one["direction"])
        for one in motions
    ]
    note = "not written; -o flow.flo, flow.npy or flow.png (an image) writes one flow, -o DIRECTORY one or many"
    if output is not None:
        note = f"flows written: {sum(len(one['files']) for one in motions)}"
    return Table("", ["frame", "next frame", "mean px>", "max px>", "direction"], rows, note)


def read_video(request: Request) -> tuple[Path, Path | None]:
    """FRAMES, and AUDIO.wav or None."""
    from perceiver_export.runtimes.tasks.base import check_top

    output = request.output
    if len(request.inputs) > 2:
        hint = "give frames, and optionally a WAV file: run BUNDLE FRAMES SOUND.wav"
        raise UsageError(f"inputs given: {len(request.inputs)}", hint)
    check_top(request.top)
    if output is not None:
        check_new_directory(output, "-o", InputError)
        if output.suffix and not output.is_dir():
            raise UsageError(f"{output} is a file name", f"name a directory: -o {output.with_suffix('')}")
        require("PIL.Image", "writing frames", "images")
    frames, audio = (*map(Path, request.inputs), None)[:2]
    assert frames is not None
    return frames, audio


def answer_video(task: Any, given: tuple[Path, Path | None], request: Request, progress: Progress) -> Answers:
    """PSNR and labels. -o saves a directory of PNG files, and ``sound.wav`` where the sampling rate is known."""
    from perceiver_export.runtimes.tasks.images import open_frames
    from perceiver_export.runtimes.tasks.sound import wav_rate
    from perceiver_export.runtimes.tasks.video import psnr

    frames, audio = given
    found: Sequence[Any] = open_frames(frames)
    used = found[: task.preprocessing.num_frames]
    ends = [readable(used[index].name) if isinstance(used[index], Path) else None for index in (0, -1)]
    feeds = task.preprocess(frames, audio)
    answer = task.reconstruct(feeds, request.top, progress)
    rate = task.preprocessing.sample_rate
    if rate is None and audio is not None:
        rate = wav_rate(audio)  # the checkpoint has none
    quality = {"video": psnr(feeds["frames"][0], answer.video)}
    if audio is not None:
        quality["sound"] = psnr(feeds["audio"][0, :, 0], answer.sound)
    names = f" ({ends[0]} to {ends[1]})" if ends[0] is not None else ""
    said = f"the first {len(used)} of {len(found)} frames{names}" if len(used) < len(found) else "all frames"
    rows = [("frames", said)]
    rows += [(f"{name}, PSNR", f"{decibels:.2f} dB") for name, decibels in quality.items()]
    rows.append(("sound", f"{rate} Hz" if audio is not None else "none given: silence"))
    labels, cells = described(answer.labels)
    rows += [(f"label {name.rstrip('.>')}", cell) for name, cell in cells.items()]
    output = request.output
    sound = "sound.wav" if rate is not None else "no sound.wav (the sampling rate is unknown)"
    note = f"{len(answer.video)} frames and {sound} are written" if output else "not written; use -o DIRECTORY"
    document = {  # the infinite PSNR of a perfect reconstruction becomes null
        "frames": {"used": len(used), "there": len(found), "first": ends[0], "last": ends[1]},
        "psnr": quality,
        **labels,
        "output": readable(output) if output is not None else None,
    }
    runtime = task.part("encoder" if task.split else None)
    return Answers(runtime, document, [Table("", ["", ""], rows, note)], lambda path: _write(path, answer, rate))


def _write(directory: Path, answer: Reconstruction, sample_rate: int | None) -> None:
    from PIL import Image

    from perceiver_export.runtimes.tasks.sound import write_wav

    digits = max(4, len(str(len(answer.frames))))
    with new_directory(directory, "-o", InputError) as temporary:
        for number, image in enumerate(answer.frames):
            Image.fromarray(image).save(temporary / f"frame_{number:0{digits}}.png")
        if sample_rate is not None:
            write_wav(temporary / "sound.wav", answer.sound, sample_rate)
