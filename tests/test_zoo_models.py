# SPDX-License-Identifier: Apache-2.0
"""The trained examples policy, game and multitask: what their README says is what the shipped weights do.

The simulator is no part of the dev extra; without it the closed loop is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from perceiver_export.calibration.validation import statistics
from perceiver_export.exporter import ExportOptions, export
from perceiver_export.runtimes import load, open_task
from tests.conftest import REPOSITORY, MadeOnce

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def bundle(request: pytest.FixtureRequest, made_once: MadeOnce, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example of the test's parameter, exported from the shipped weights; do not change it."""
    monkeypatch.chdir(REPOSITORY)
    name, batch = request.param
    options = ExportOptions(batch=batch)
    return made_once(f"zoo-{name}-{batch}", lambda path: export(f"examples.{name}.model:{name}", path, options))


def said(name: str, what: str) -> float:
    """The figure in the first line of the README's table that has ``what`` in its first column: that of fp32."""
    rows = [line.split("|")[1:-1] for line in (EXAMPLES / name / "README.md").read_text(encoding="utf-8").splitlines()]
    (row,) = (row for row in rows if len(row) > 2 and row[0].strip() == what)
    return float(re.findall(r"\d+\.?\d*", row[1])[0])


@pytest.mark.parametrize("bundle", [("policy", 100)], indirect=True)
def test_the_policy_is_as_close_to_the_expert_as_the_readme_says(bundle: Path) -> None:
    with np.load(EXAMPLES / "policy" / "test.npz") as data:
        states, actions = data["state"], data["label"]
    with open_task(bundle) as task:
        found = task({"state": states})["actions"]

    assert np.abs(found - actions).mean() == pytest.approx(said("policy", "mae"), abs=0.001)


@pytest.mark.parametrize("bundle", [("game", 100)], indirect=True)
def test_the_game_is_right_as_often_as_the_readme_says(bundle: Path) -> None:
    with np.load(EXAMPLES / "game" / "test.npz") as data:
        given, labels = {name: data[name] for name in ("pieces", "pieces_mask")}, data["labels"]
    with open_task(bundle) as task:
        found = task(given)["scores"].argmax(1)

    assert 100 * (found == labels).mean() == pytest.approx(said("game", "top-1"), abs=0.1)


@pytest.mark.parametrize("bundle", [("multitask", 100)], indirect=True)
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


@pytest.mark.parametrize("name", ["policy", "game", "multitask"])
def test_an_example_is_as_small_as_it_must_be(name: str) -> None:
    sizes = {path.suffix: path.stat().st_size for path in (EXAMPLES / name).iterdir()}
    data = sum(path.stat().st_size for path in (EXAMPLES / name).glob("*.npz"))

    assert sizes[".pt"] <= 2_000_000
    assert data <= 1_000_000
    assert len(json.loads((EXAMPLES / name / "demo.json").read_text(encoding="utf-8"))["shows"]) <= 70


@pytest.mark.parametrize(
    ("fen", "label"),
    [
        ("7k/6Q1/5K2/8/8/8/8/8 b - - 0 1", "checkmate"),
        ("4k3/8/8/8/4R3/8/8/4K3 b - - 0 1", "check"),
        ("rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1", "no check"),
    ],
)
@pytest.mark.parametrize("bundle", [("game", 100)], indirect=True)
def test_the_game_reads_positions(bundle: Path, fen: str, label: str) -> None:
    from examples.game.positions import inputs

    with open_task(bundle) as task:
        (scores,) = task({name: np.repeat(array, 1, 0) for name, array in inputs([fen]).items()})["scores"]

    assert task.manifest.labels[scores.argmax()] == label


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs the simulator: pip install metaworld")
@pytest.mark.parametrize("bundle", [("policy", 1)], indirect=True)
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
