# SPDX-License-Identifier: Apache-2.0
"""The trained examples: their bundles answer as their READMEs say.

The simulator of the policy is no part of the dev extra; without it the closed loop is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perceiver_export.calibration import validate
from perceiver_export.calibration.validation import statistics
from perceiver_export.exporter import ExportOptions, export
from perceiver_export.runtimes import load, open_task
from perceiver_export.runtimes.tasks.base import Classifier
from tests.cli.commands import succeed
from tests.conftest import REPOSITORY, MadeOnce

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def name() -> str:
    return ""


@pytest.fixture
def bundle(name: str, request: pytest.FixtureRequest, made_once: MadeOnce, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example of the test, or of the fixture's parameter with a batch; do not change it."""
    monkeypatch.chdir(REPOSITORY)
    example, batch = getattr(request, "param", (name, 1))
    model = f"examples.{example}.model:{example}"
    source = EXAMPLES / example / "checkpoint" if example in ("flow", "video") else model
    return made_once(f"example {example} {batch}", lambda path: export(source, path, ExportOptions(batch=batch)))


def of(name: str, batch: int = 1) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bundle", [(name, batch)], indirect=True)


def said(name: str, what: str) -> float:
    """The figure in the first line of the README's table that has ``what`` in its first column: that of fp32."""
    text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines()]
    (row,) = (row for row in rows if len(row) > 1 and row[0].strip() == what)
    return float(re.findall(r"\d+\.?\d*", row[1])[0])


def arrays(name: str, *names: str) -> dict[str, Any]:
    """Of the example's test data."""
    with np.load(EXAMPLES / name / "test.npz") as data:
        return {key: data[key] for key in names}


@of("policy", 100)
def test_the_policy_is_as_close_to_the_expert_as_the_readme_says(bundle: Path) -> None:
    data = arrays("policy", "state", "label")
    with open_task(bundle) as task:
        found = task({"state": data["state"]})["actions"]

    assert np.abs(found - data["label"]).mean() == pytest.approx(said("policy", "mae"), abs=0.001)


@of("game", 100)
def test_the_game_is_right_as_often_as_the_readme_says(bundle: Path) -> None:
    with open_task(bundle) as task:
        found = task(arrays("game", "pieces", "pieces_mask"))["scores"].argmax(1)

    right = found == arrays("game", "labels")["labels"]
    assert 100 * right.mean() == pytest.approx(said("game", "top-1"), abs=0.1)


@of("multitask", 100)
def test_each_of_three_outputs_is_as_good_as_the_readme_says(bundle: Path) -> None:
    from examples.multitask.data import read

    given = read("test.npz", 10_000)
    with open_task(bundle) as task:
        found = task({"image": given["image"]})

    right = [found["label"].argmax(1) == given["labels"], found["turn"].argmax(1) == given["quarters"]]
    for name, answers in zip(("top-1", "turn"), right, strict=True):
        assert 100 * answers.mean() == pytest.approx(said("multitask", name), abs=0.05)
    error = np.abs(255 * np.clip(found["upright"], 0, 1) - given["picture"]).mean()
    assert error == pytest.approx(said("multitask", "upright"), abs=0.02)


@of("flow")
def test_flow_is_as_good_as_the_readme_says(bundle: Path) -> None:
    found = {one.name: one for one in validate(bundle, EXAMPLES / "flow" / "test.npz").metrics}

    assert found["epe"].candidate.value == pytest.approx(said("flow", "Perceiver, fp32"), abs=0.002)


@of("video")
def test_video_is_as_good_as_the_readme_says(bundle: Path) -> None:
    result = validate(bundle, EXAMPLES / "video" / "test.npz")

    found = {one.name: one.candidate.value for one in result.metrics}
    assert found["psnr"] == pytest.approx(said("video", "PSNR of the frames, Perceiver, fp32"), abs=0.02)
    assert found["sound snr"] == pytest.approx(said("video", "SNR of the sound, Perceiver, fp32"), abs=0.02)


@of("video")
def test_video_names_the_clip(bundle: Path) -> None:
    data = arrays("video", "frames", "audio", "label")
    with open_task(bundle) as task:
        feeds = {name: data[name].astype(np.float32) for name in ("frames", "audio")}
        right = task.decode("label", task.encode(feeds)).argmax(-1) == data["label"]

    assert right.sum() == said("video", "labels that are right, of 36, Perceiver, fp32")


@pytest.mark.parametrize(("name", "given"), [("speech", "mel"), ("points", "points")])
def test_the_readme_says_the_accuracy_on_the_test_data(name: str, given: str, bundle: Path) -> None:
    top1 = re.search(r"top-1 (\d+\.\d+) \(", (EXAMPLES / name / "README.md").read_text(encoding="utf-8"))
    data = arrays(name, given, "labels")
    with open_task(bundle) as classify:
        assert isinstance(classify, Classifier)
        scores = classify.run_inputs({given: data[given].astype(np.float32)})

    assert top1 is not None
    # Another CPU may decide one or two close cases differently.
    right = scores.argmax(-1) == data["labels"]
    assert abs(100 * float(right.mean()) - float(top1[1])) <= 200 / len(right)


@pytest.mark.parametrize("name", ["speech", "points"])
def test_run_names_what_the_shipped_files_hold(name: str, bundle: Path) -> None:
    folder = EXAMPLES / name
    files = sorted(folder.glob("prompts/*.wav")) if name == "speech" else [folder / "clouds" / "chair.ply"]
    found = json.loads(succeed("run", bundle, *files, "--json"))

    answers = [answer["labels"][0]["label"].lower() for answer in found["answers"]]
    assert answers == [file.stem for file in files]


@of("flow")
def test_flow_of_the_real_frames_is_written_as_a_picture(bundle: Path, tmp_path: Path) -> None:
    frames = sorted((EXAMPLES / "flow" / "frames").iterdir())

    succeed("run", bundle, *frames, "-o", tmp_path / "flow.png")

    with Image.open(frames[0]) as frame, Image.open(tmp_path / "flow.png") as picture:
        assert picture.size == frame.size
        assert np.ptp(np.asarray(picture)) > 100  # something moves


@of("video")
def test_the_rabbit_is_reconstructed_as_frames_and_sound(bundle: Path, tmp_path: Path) -> None:
    rabbit = EXAMPLES / "video" / "rabbit"

    succeed("run", bundle, rabbit, f"{rabbit}.wav", "-o", tmp_path / "rabbit")

    found = sorted((tmp_path / "rabbit").glob("*.png"))
    errors = [
        (np.asarray(Image.open(one), float) - np.asarray(Image.open(given), float)).std()
        for one, given in zip(found, sorted(rabbit.iterdir()), strict=True)
    ]
    assert max(errors) < 40
    assert (tmp_path / "rabbit" / "sound.wav").stat().st_size == 44 + 2 * 1280


@pytest.mark.parametrize(
    ("fen", "label"),
    [
        ("7k/6Q1/5K2/8/8/8/8/8 b - - 0 1", "checkmate"),
        ("4k3/8/8/8/4R3/8/8/4K3 b - - 0 1", "check"),
        ("rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1", "no check"),
    ],
)
@of("game", 100)
def test_the_game_reads_positions(bundle: Path, fen: str, label: str) -> None:
    from examples.game.positions import inputs

    with open_task(bundle) as task:
        (scores,) = task({name: np.repeat(array, 1, 0) for name, array in inputs([fen]).items()})["scores"]

    assert task.manifest.labels[scores.argmax()] == label


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs the simulator: pip install metaworld")
@of("policy")
def test_the_policy_succeeds_in_the_simulator_and_again_in_the_same_way(bundle: Path) -> None:
    from examples.policy.closed_loop import FIRST_SEED, chunked, episodes, simulator

    simulated, seeds = simulator(), range(FIRST_SEED, FIRST_SEED + 8)
    with load(bundle) as runtime:
        first, again = (episodes(simulated, lambda: chunked(runtime, []), seeds) for _ in range(2))

    assert first.sum() >= 6
    assert np.array_equal(first, again)


def test_closed_loop_bounds_are_the_products() -> None:
    from examples.policy.closed_loop import compare

    reference, found = np.ones(200, bool), np.arange(200) >= 3
    first, second = compare(["a", "b"], [reference, found], [[0.001], [0.002]])

    assert "drop" not in first
    assert (second["lost"], second["gained"]) == (3, 0)
    assert second["drop"] == statistics.drop(3, 0, 200)
    assert second["ms a call"] == pytest.approx(2)


def test_the_examples_are_small() -> None:
    def sizes(name: str, pattern: str) -> list[int]:
        return [path.stat().st_size for path in (EXAMPLES / name).glob(pattern) if path.is_file()]

    for name in ("policy", "game", "multitask"):
        assert max(sizes(name, "*.pt")) <= 2_000_000
        assert sum(sizes(name, "*.npz")) <= 1_000_000
    for name in ("speech", "points"):
        assert sum(sizes(name, "checkpoint/*")) <= 2_500_000
        assert sum(sizes(name, "**/*")) <= 5_000_000
