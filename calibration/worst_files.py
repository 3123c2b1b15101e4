# SPDX-License-Identifier: Apache-2.0
"""The worst samples as files: each one's inputs and targets, its picture or text, and worst.json that lists them."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from perceiver_export.calibration.examples import Example
from perceiver_export.calibration.worst import WorstSample
from perceiver_export.runtimes.errors import DataError


def check_new_folder(path: Path) -> None:
    """Before a model runs for minutes: refuse a folder that is there, or cannot be made. Raises DataError."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise DataError(f"{path} is there already", "save the worst samples to a directory that is not there yet")
    if not path.absolute().parent.is_dir():
        raise DataError(f"{path} cannot be made: its folder is not there", "choose another directory")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``path`` when the block ends well, and vanishes otherwise.

    Raises DataError where that cannot be, or something is there already.
    """
    check_new_folder(path)
    temporary = path.absolute().with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}", "choose another directory") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_worst(path: Path, samples: Sequence[WorstSample], examples: Sequence[Example]) -> None:
    """Write NN.npz, NN.png or NN.txt, and worst.json; all or nothing. Raises DataError."""
    with new_folder(path) as temporary:
        for number, (sample, example) in enumerate(zip(samples, examples, strict=True)):
            targets = {f"target_{name}": target for name, target in example.targets.items()}
            np.savez(temporary / f"{number:02}.npz", **example.feeds, **targets)  # type: ignore[arg-type]
            if sample.picture:
                content = base64.b64decode(sample.picture.partition(",")[2])
                (temporary / f"{number:02}.png").write_bytes(content)
            if sample.text:
                (temporary / f"{number:02}.txt").write_text(sample.text, encoding="utf-8")
        listed = [msgspec.structs.replace(sample, picture="") for sample in samples]
        (temporary / "worst.json").write_bytes(msgspec.json.format(msgspec.json.encode(listed), indent=2) + b"\n")
