# SPDX-License-Identifier: Apache-2.0
"""The worst as files: each sample's inputs and targets, its picture or text, worst.json that lists the samples, and
classes.json with the classes, the worst first.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from perceiver_export.calibration.directories import new_directory
from perceiver_export.calibration.examples import Example
from perceiver_export.calibration.worst import WorstClass, WorstSample
from perceiver_export.runtimes.errors import DataError

OPTION = "--save-worst"


def write_worst(
    path: Path, samples: Sequence[WorstSample], examples: Sequence[Example], classes: Sequence[WorstClass]
) -> None:
    """Write NN.npz, NN.png or NN.txt, worst.json, and of classifiers classes.json; all or nothing. Raises DataError."""
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
        _write(temporary / "worst.json", listed)
        if classes:
            _write(temporary / "classes.json", classes)


def _write(path: Path, rows: Sequence[object]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")
