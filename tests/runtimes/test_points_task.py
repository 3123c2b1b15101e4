# SPDX-License-Identifier: Apache-2.0
"""Point-cloud classification: clouds of any size into a graph of a fixed number of points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes.errors import BundleError, InputError, UsageError
from perceiver_export.runtimes.preprocessing import PointsPreprocessing, VideoPreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks.points import CloudLike, PointCloudClassification, into_unit_cube
from tests.runtimes.conftest import Ask
from tests.runtimes.models import manifest, opened, spec
from tests.runtimes.numpy_engine import NumpyEngine

N = 8
CLOUD = np.random.default_rng(0).normal(size=(20, 3)) + 5
LABELS = ("chair", "table", "lamp")


def squares(feeds: Feeds) -> dict[str, Array]:
    """Scores: the mean square of each axis over the points that count."""
    mask = feeds.get("points_mask", np.ones(feeds["points"].shape[:2], np.int32))[..., None]
    return {"logits": (feeds["points"] ** 2 * mask).sum(axis=1) / mask.sum(axis=1).astype(np.float32)}


def task_of(
    masked: bool = True, batch: int | str = 1, labels: tuple[str, ...] = LABELS, **changes: Any
) -> tuple[PointCloudClassification, NumpyEngine]:
    ranges = {"batch": (2, 3)} if batch == "batch" else {}
    mask = (spec("points_mask", batch, N, dtype="int32", **ranges),) * masked
    inputs = changes.get("inputs", (spec("points", batch, N, 3, **ranges), *mask))
    engine = NumpyEngine(squares, inputs, changes.get("outputs", (spec("logits", batch, 3, **ranges),)))
    steps = changes.get("preprocessing", PointsPreprocessing(N))
    described = manifest("point-cloud-classification", engine, steps, labels=labels)
    return opened(PointCloudClassification, described, engine), engine


def test_too_many_points_are_thinned_out_and_normalised() -> None:
    task, engine = task_of()
    found = task(CLOUD, top=3)

    points = into_unit_cube(CLOUD[[0, 2, 5, 7, 10, 12, 15, 17]])
    np.testing.assert_array_equal(engine.calls[0]["points"][0], points)
    assert engine.calls[0]["points_mask"].tolist() == [[1] * N]
    scores = (points**2).mean(axis=0)
    probabilities = np.exp(scores) / np.exp(scores).sum()
    assert [one.index for one in found] == np.argsort(-scores).tolist()
    assert {one.label: one.probability for one in found} == pytest.approx(
        dict(zip(LABELS, probabilities.tolist(), strict=True)), abs=1e-6
    )


def test_too_few_points_are_padded_and_masked() -> None:
    task, engine = task_of()
    task(CLOUD[:5])

    np.testing.assert_array_equal(engine.calls[0]["points"][0, :5], into_unit_cube(CLOUD[:5]))
    assert not engine.calls[0]["points"][0, 5:].any()
    assert engine.calls[0]["points_mask"].tolist() == [[1] * 5 + [0] * 3]
    assert engine.calls[0]["points_mask"].dtype == np.int32


def test_a_model_without_a_mask_needs_all_its_points() -> None:
    task, engine = task_of(masked=False)
    with pytest.raises(InputError, match="has 5 points") as caught:
        task(CLOUD[:5])
    assert f"needs {N}" in caught.value.message
    assert not engine.calls

    task(CLOUD[:N])
    assert engine.calls[0].keys() == {"points"}


@pytest.mark.parametrize("batch", [2, "batch"])
def test_files_and_arrays_in_any_batch_give_the_same(batch: int | str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", CLOUD)
    np.savetxt(tmp_path / "a.xyz", CLOUD, fmt="%.17g")
    task, engine = task_of(batch=batch)
    mixed: list[CloudLike] = [CLOUD[:7], tmp_path / "a.npy", CLOUD, tmp_path / "a.xyz", CLOUD[3:]]
    logits = task.logits(mixed)

    alone, _ = task_of()
    np.testing.assert_array_equal(logits, alone.logits([CLOUD[:7], CLOUD, CLOUD, CLOUD, CLOUD[3:]]))
    assert len(engine.calls) == (3 if batch == 2 else 2)


@pytest.mark.parametrize(
    "cloud",
    [
        np.zeros((0, 3)),
        np.zeros((9, 4)),
        np.full((9, 3), np.nan),
        np.zeros((1, 9, 3)),
        [[1, 2, 3], [4, 5]],
        [["1", "2", "3"]],
        [],
        None,
        "nowhere.xyz",
        Path(__file__),
    ],
)
def test_what_is_no_cloud_is_refused(cloud: Any) -> None:
    task, engine = task_of()
    with pytest.raises(InputError):
        task(cloud)
    with pytest.raises(UsageError):
        task(CLOUD, top=0)
    assert not engine.calls


@pytest.mark.parametrize("clouds", [CLOUD, CLOUD.tolist()], ids=["array", "lists"])
def test_one_cloud_is_one_sample_and_may_be_numbers_in_lists(clouds: Any) -> None:
    task, _ = task_of()

    assert task(clouds) == task(CLOUD)
    assert task.logits(clouds).shape[0] == 1
    both: list[Any] = [clouds, clouds]
    np.testing.assert_array_equal(task.logits(both), np.repeat(task.logits(clouds), 2, axis=0))


@pytest.mark.parametrize("clouds", [[], iter([]), 3], ids=["an empty list", "an empty iterator", "a number"])
def test_no_clouds_and_no_list_of_clouds_are_refused(clouds: Any) -> None:
    task, engine = task_of()
    with pytest.raises(InputError, match="point clouds"):
        task.logits(clouds)
    assert not engine.calls


@pytest.mark.parametrize(
    "changes",
    [
        {"preprocessing": None},
        {"preprocessing": VideoPreprocessing(1, 1, 1, 1, 1)},
        {"preprocessing": PointsPreprocessing(N + 1)},
        {"labels": ("one", "two")},
        {"inputs": (spec("cloud", 1, N, 3),)},
        {"inputs": (spec("points", 1, N, 4),)},
        {"outputs": (spec("one", 1, 3), spec("other", 1, 3))},
    ],
)
def test_manifests_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="2 labels for 3 scores" if "labels" in changes else None):
        task_of(**changes)


def test_run_takes_files_and_directories(ask: Ask, tmp_path: Path) -> None:
    task, _ = task_of()
    np.save(tmp_path / "b.npy", CLOUD)
    np.savetxt(tmp_path / "a.xyz", CLOUD[:4])
    (tmp_path / "notes.txt").write_text("no cloud", encoding="utf-8")
    answers = ask(task, tmp_path, output=tmp_path / "out.json", as_json=True)["answers"]

    assert [answer["input"] for answer in answers] == [str(tmp_path / "a.xyz"), str(tmp_path / "b.npy")]
    assert sorted(one["label"] for one in answers[1]["labels"]) == sorted(LABELS)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["answers"] == answers
    assert ask(task, *[tmp_path / "b.npy"] * 2, as_json=True)["answers"] == [answers[1]] * 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no point clouds"):
        ask(task, tmp_path / "empty")
