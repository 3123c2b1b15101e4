# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export run` with a video autoencoder: frames and sound in, both back out, and a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from perceiver_export.calibration.directories import check_new_directory, new_directory
from perceiver_export.exporter.cli.answers import ranked, title
from perceiver_export.exporter.cli.files import text
from perceiver_export.exporter.cli.output import print_json, print_table, progress_bar
from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.runtimes.errors import InputError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from perceiver_export.runtimes.tasks.video_autoencoding import Reconstruction, VideoAutoencoding


@dataclass(frozen=True)
class _Frames:
    """Which frames were used, of how many; names only where they are files."""

    used: int
    there: int
    first: str | None
    last: str | None

    def __str__(self) -> str:
        names = f" ({self.first} to {self.last})" if self.first is not None else ""
        return f"the first {self.used} of {self.there} frames{names}" if self.used < self.there else "all frames"


def run(bundle: str, inputs: list[str], output: Path | None, options: RunOptions) -> None:
    """FRAMES [AUDIO.wav]: PSNR and labels; with ``output`` a directory of PNG files, and ``sound.wav``."""
    from perceiver_export.runtimes.tasks.ranking import check_top
    from perceiver_export.runtimes.tasks.video_autoencoding import psnr

    if len(inputs) > 2:
        raise UsageError(f"inputs given: {len(inputs)}", "give frames, and a WAV file or nothing: run BUNDLE FRAMES")
    frames, audio = Path(inputs[0]), Path(inputs[1]) if len(inputs) == 2 else None
    check_top(options.top)
    if output is not None:
        check_new_directory(output, "-o", InputError)
        if output.suffix and not output.is_dir():
            raise UsageError(
                f"{output} is a file's name", f"frames and sound go into a directory: -o {output.with_suffix('')}"
            )
        _check_pillow()
    with (
        cast("VideoAutoencoding", options.open_task(bundle)) as task,
        progress_bar("encode", quiet=options.json) as progress,
    ):
        used = _used(frames, task.preprocessing.num_frames)
        feeds = task.preprocess(frames, audio)
        answer = task.reconstruct(feeds, options.top, progress)
        rate = task.preprocessing.sample_rate
        where = task.part("encoder" if task.split else None).describe()
    quality = {"video": psnr(feeds["frames"][0], answer.video)}
    if audio is not None:
        quality["sound"] = psnr(feeds["audio"][0, :, 0], answer.sound)
    if output is not None:
        _write(output, answer, rate)
    _show(bundle, where, used, quality, answer, output, options)


def _used(frames: Path, count: int) -> _Frames:
    from perceiver_export.runtimes.frame_files import open_frames

    found: Sequence[Any] = open_frames(frames)
    names = [text(file.name) for file in (*found[:count][:1], *found[:count][-1:]) if isinstance(file, Path)]
    return _Frames(min(count, len(found)), len(found), names[0] if names else None, names[-1] if names else None)


def _check_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "writing frames needs Pillow", "pip install 'perceiver-export[images]', or run without -o"
        ) from error


def _write(directory: Path, answer: Reconstruction, sample_rate: int) -> None:
    from PIL import Image

    from perceiver_export.runtimes.audio_files import write_wav

    digits = max(4, len(str(len(answer.pictures))))
    with new_directory(directory, "-o", InputError) as temporary:
        for number, picture in enumerate(answer.pictures):
            Image.fromarray(picture).save(temporary / f"frame_{number:0{digits}}.png")
        write_wav(temporary / "sound.wav", answer.sound, sample_rate)


def _show(
    bundle: str,
    where: dict[str, Any],
    used: _Frames,
    quality: dict[str, float],
    answer: Reconstruction,
    output: Path | None,
    options: RunOptions,
) -> None:
    if options.json:
        written = text(output) if output is not None else None
        # A perfect reconstruction has infinite PSNR, which JSON cannot say: null.
        print_json({"runtime": where, "frames": used, "psnr": quality, "labels": answer.labels, "output": written})
        return
    rows = [("frames", str(used))]
    rows += [(f"{name}, PSNR", f"{decibels:.2f} dB") for name, decibels in quality.items()]
    if "sound" not in quality:
        rows.append(("sound", "none given: silence"))
    rows += [(f"label {rank}", label) for rank, label in enumerate(ranked(answer.labels), start=1)]
    count = len(answer.video)
    note = f"written: {count} frames and sound.wav in {output}" if output else "not written; -o DIRECTORY writes both"
    print_table(title(bundle, where), ["", ""], rows, note)
