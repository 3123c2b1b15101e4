# SPDX-License-Identifier: Apache-2.0
"""The worst samples as files: each one's inputs and targets, its picture or text, and worst.json that lists them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from perceiver_export.calibration.directories import new_directory
from perceiver_export.calibration.examples import Example
from perceiver_export.calibration.worst import WorstSample
from perceiver_export.runtimes.errors import DataError

OPTION = "--save-worst"


def write_worst(path: Path, samples: Sequence[WorstSample], examples: Sequence[Example]) -> None:
    """Write NN.npz, NN.png or NN.txt, and worst.json; all or nothing. Raises DataError."""
    with new_directory(path, OPTION, DataError) as temporary:
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
