# SPDX-License-Identifier: Apache-2.0
"""The examples of sound and of point clouds: their bundles answer as their READMEs say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from perceiver_export.exporter import export
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.tasks.base import Classifier
from tests.cli.commands import succeed
from tests.conftest import MadeOnce

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SOURCES = {"speech": ("examples.speech.model:speech", "mel"), "points": ("examples.points.model:points", "points")}


@pytest.fixture(params=sorted(SOURCES))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def bundle(name: str, made_once: MadeOnce) -> Path:
    return made_once(f"example {name}", lambda path: export(SOURCES[name][0], path))


def test_the_readme_says_the_accuracy_on_the_test_data(name: str, bundle: Path) -> None:
    said = re.search(r"top-1 (\d+\.\d+) \(", (EXAMPLES / name / "README.md").read_text(encoding="utf-8"))
    with np.load(EXAMPLES / name / "test.npz") as data, open_task(bundle) as classify:
        assert isinstance(classify, Classifier)
        inputs, labels = data[SOURCES[name][1]].astype(np.float32), data["labels"]
        scores = classify.run_inputs({SOURCES[name][1]: inputs})

    assert said is not None
    # Another CPU may decide one or two close cases differently.
    assert abs(100 * float((scores.argmax(-1) == labels).mean()) - float(said[1])) <= 200 / len(labels)


def test_run_names_what_the_shipped_files_hold(name: str, bundle: Path) -> None:
    folder = EXAMPLES / name
    files = sorted(folder.glob("prompts/*.wav")) if name == "speech" else [folder / "clouds" / "chair.ply"]
    found = json.loads(succeed("run", bundle, *files, "--json"))

    answers = [answer["labels"][0]["label"].lower() for answer in found["answers"]]
    assert answers == [file.stem for file in files]


def test_the_example_is_small(name: str) -> None:
    sizes = {path: path.stat().st_size for path in (EXAMPLES / name).rglob("*") if path.is_file()}
    assert sum(size for path, size in sizes.items() if path.parent.name == "checkpoint") <= 2_500_000
    assert sum(sizes.values()) <= 5_000_000
