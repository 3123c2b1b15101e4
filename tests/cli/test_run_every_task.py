# SPDX-License-Identifier: Apache-2.0
"""Every system of the papers from export to its answer, whole and split, as commands, on files of its own kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.exporter.cli.run import RUNNERS
from perceiver_export.exporter.verification import TOLERANCE
from perceiver_export.runtimes import load, open_bundle
from perceiver_export.runtimes.tasks import TASKS
from tests.conftest import SmallBundle

from . import small_models
from .commands import fail, succeed
from .input_files import write_inputs
from .torch_answers import found_numbers, torch_numbers

RNG = np.random.default_rng(0)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


# System, what to give `run`, what its answer must hold.
RUNS: list[tuple[str, list[str], list[str]]] = [
    ("language", ["text.txt"], ["good ", "position"]),
    ("sentiment", ["This is fine"], ["bad", "good"]),
    ("glue", ["Is it so?"], ["cola", "mnli"]),
    ("pictures", ["frames"], ["cat", "dog", "bird", "frame1.png"]),
    ("flow", ["frames/frame0.png", "frames/frame1.png"], ["frame0.png", "mean"]),
    ("video", ["video", "sound.wav"], ["PSNR"]),
    ("sound", ["sound.wav", "video"], ["hum", "hiss", "bang"]),
    ("first_sound", ["sound.wav", "video"], ["hum", "hiss", "bang"]),
    ("mel", ["sound.wav"], ["hum", "hiss", "bang"]),
    ("points", ["cloud.xyz"], ["chair", "cloud.xyz"]),
    ("sets", ["units.npz"], ["outputs", "9 × 8"]),
]
WITHOUT_LABELS = ("glue", "flow", "sets")


def test_every_task_has_a_command_and_says_what_it_takes() -> None:
    assert TASKS.keys() == RUNNERS.keys()


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize(("system", "inputs", "expected"), RUNS, ids=[run[0] for run in RUNS])
def test_run_answers(
    small_bundle: SmallBundle, files: Path, system: str, split: bool, inputs: list[str], expected: list[str]
) -> None:
    given = [str(files / text) if (files / text).exists() else text for text in inputs]
    shown = succeed("run", small_bundle(system, split), *given)
    every = [] if system in WITHOUT_LABELS else ["--top", "999"]
    document = json.loads(succeed("run", small_bundle(system, split), *given, "--json", *every))

    assert all(text in shown for text in expected), shown
    assert document["runtime"]["target"] == "ort-cpu"
    numbers = found_numbers(system, document)
    reference = torch_numbers(system, getattr(small_models, system)(), small_bundle(system, False), given)
    assert numbers.keys() == reference.keys()
    for name, values in reference.items():
        np.testing.assert_allclose(numbers[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("system", [run[0] for run in RUNS])
def test_split_and_whole_are_one_model(small_bundle: SmallBundle, system: str) -> None:
    whole, split = (open_bundle(small_bundle(system, kind)) for kind in (False, True))
    with np.load(whole.path / "golden.npz") as golden:
        feeds = {key.removeprefix("input/"): golden[key] for key in golden if key.startswith("input/")}
        expected = {key.removeprefix("output/"): golden[key] for key in golden if key.startswith("output/")}
    with load(split) as runtime:
        found = runtime.run(feeds)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        # DeepMind masks queries of padding; a split decoder does not see the padding.
        if mask := {"language": "tokens_mask", "sets": "entities_mask"}.get(system):
            there = feeds[mask][0].astype(bool)
            found[name], array = found[name][:, there], array[:, there]
        np.testing.assert_allclose(found[name], array, rtol=0, atol=TOLERANCE * np.abs(array).max())


@pytest.mark.parametrize("system", WITHOUT_LABELS)
def test_labels_are_not_counted_where_there_are_none(small_bundle: SmallBundle, system: str) -> None:
    assert "no labels" in fail("run", small_bundle(system, False), "anything", "--top", "2")


def test_own_models_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Path(__file__).resolve().parents[2] / "examples"
    with monkeypatch.context() as there:
        there.chdir(examples)
        succeed("export", "your_own:robot", "-o", tmp_path / "robot")
    arrays: dict[str, Any] = {
        "sound": RNG.normal(size=(160, 1)),
        "touch": RNG.normal(size=(6, 8, 2)),
        "joints": RNG.normal(size=(7, 3)),
        "joints_mask": np.array([1] * 5 + [0] * 2),
    }
    np.savez(tmp_path / "arrays.npz", **arrays)
    succeed("run", tmp_path / "robot", tmp_path / "arrays.npz", "-o", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as out:
        assert {name: out[name].shape for name in out} == {"objects": (5, 10), "motion": (20, 7)}
    for spec, expected in (("math:pi", "float"), ("os:getcwd", "str")):
        assert expected in fail("export", spec, "-o", tmp_path / "no")
    assert not (tmp_path / "no").exists()
