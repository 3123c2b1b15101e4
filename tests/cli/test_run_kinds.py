# SPDX-License-Identifier: Apache-2.0
"""The kind of the outputs decides what tasks and `run` print: exclusive labels, independent labels, or values."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from perceiver_export.runtimes import load, open_task
from perceiver_export.runtimes.errors import BundleError
from perceiver_export.runtimes.manifest import OutputKind
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks.base import Value
from tests.calibration.linear_bundles import CASES, SAMPLES, Case
from tests.cli.commands import fail, perceiver_export, succeed, unwrapped

POINTS, VIDEO = CASES["points"], CASES["video"]
KINDS: tuple[OutputKind, ...] = ("single-label", "multi-label", "regression")


def write(case: Case, folder: Path, kind: OutputKind) -> Path:
    """A bundle whose output has that kind."""
    output = list(case.outputs)[-1]
    return dataclasses.replace(case, kinds={output: kind}).write(folder / kind)


def scores_of(bundle: Path, cloud: Array) -> Array:
    with open_task(bundle) as task, load(bundle) as runtime:
        feeds = task.preprocess(cloud)
        found: Array = runtime.run({"points": np.repeat(feeds["points"], SAMPLES, axis=0)})["scores"][0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_kind_says(kind: OutputKind, tmp_path: Path) -> None:
    bundle, cloud = write(POINTS, tmp_path, kind), np.random.default_rng(0).normal(size=(20, 3))
    scores = scores_of(bundle, cloud)

    with open_task(bundle) as task:
        answer = task(cloud, top=3)
        assert task.kind == kind

    if kind == "regression":
        assert [one.label for one in answer] == list(POINTS.labels)
        assert [one.value for one in answer] == pytest.approx(scores.tolist())
        assert all(isinstance(one, Value) and math.isnan(one.probability) for one in answer)
        return
    assert not any(isinstance(one, Value) for one in answer)
    expected = special.softmax(scores) if kind == "single-label" else special.expit(scores)
    assert [one.probability for one in answer] == pytest.approx(sorted(expected, reverse=True), rel=1e-5)
    assert [one.index for one in answer] == np.argsort(-scores).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_run_shows_labels_or_values(kind: OutputKind, tmp_path: Path) -> None:
    bundle, cloud = write(POINTS, tmp_path, kind), np.random.default_rng(0).normal(size=(20, 3))
    np.save(tmp_path / "cloud.npy", cloud)

    shown = succeed("run", bundle, tmp_path / "cloud.npy")
    (answer,) = json.loads(succeed("run", bundle, tmp_path / "cloud.npy", "--json"))["answers"]

    assert ("%" in shown) == (kind != "regression")
    assert ("labels are independent" in shown) == (kind == "multi-label")
    if kind == "regression":
        scores = scores_of(bundle, cloud)
        assert [one["value"] for one in answer["values"]] == pytest.approx(scores.tolist())
        assert all(name in shown for name in POINTS.labels)
        assert f"{scores[0]:.6g}" in shown
        assert "--top" in fail("run", bundle, tmp_path / "cloud.npy", "--top", "2")
    else:
        assert {"label", "index", "probability"} == answer["labels"][0].keys()


@pytest.mark.parametrize("name", ["one of arrays", "values of arrays"])
def test_an_output_of_arrays_that_labels_judge_gives_answers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case = dataclasses.replace(case, labels=("red", "green", "blue")[: next(iter(case.outputs.values()))[0]])
    bundle = case.write(tmp_path / "bundle")
    np.savez(tmp_path / "in.npz", x=case.feeds()["x"])
    (output, kind), *_ = case.kinds.items()
    with load(bundle) as runtime:
        scores = runtime.run(case.feeds())[output]

    shown = succeed("run", bundle, tmp_path / "in.npz")
    answers = json.loads(succeed("run", bundle, tmp_path / "in.npz", "--json"))["answers"]

    assert len(answers) == SAMPLES
    assert f"answers of {output}" in shown
    assert "60 more samples" in shown
    if kind == "regression":
        found = [[one["value"] for one in answer["values"]] for answer in answers]
        np.testing.assert_allclose(found, scores, rtol=1e-5)
        assert "--top" in fail("run", bundle, tmp_path / "in.npz", "--top", "1")
        return
    assert [answer["labels"][0]["index"] for answer in answers] == scores.argmax(axis=1).tolist()
    best = case.labels[scores[0].argmax()]
    assert f"{best}  {special.softmax(scores[0]).max():.1%}" in shown
    (answer, *_) = json.loads(succeed("run", bundle, tmp_path / "in.npz", "--top", "1", "--json"))["answers"]
    assert len(answer["labels"]) == 1


def test_kinds_that_an_older_version_did_not_write_are_said_to_be_assumed(tmp_path: Path) -> None:
    bundle = write(POINTS, tmp_path, "single-label")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    del manifest["output_kinds"]
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1}), encoding="utf-8")
    np.savez(tmp_path / "data.npz", points=POINTS.feeds()["points"])
    commands: list[list[str | Path]] = [["inspect", bundle], ["validate", bundle, "--data", tmp_path / "data.npz"]]

    for command in commands:
        done = perceiver_export(*command)
        assert done.returncode == 0
        assert unwrapped(done.stdout).count("output kinds are assumed (scores: single-label)") == 1


def test_texts_have_values_under_their_names(tmp_path: Path) -> None:
    bundle = CASES["text"].write(tmp_path / "text")

    shown = succeed("run", bundle, "good", "bad")
    answers = json.loads(succeed("run", bundle, "good", "bad", "--json"))["answers"]

    assert "stars" in shown
    assert "%" not in shown
    assert [one["values"][0]["label"] for one in answers] == ["stars", "stars"]
    assert answers[0]["values"][0]["value"] != answers[1]["values"][0]["value"]


def test_the_label_of_a_video_may_be_values_too(tmp_path: Path) -> None:
    bundle = write(VIDEO, tmp_path, "regression")
    feeds = {name: array[:1] for name, array in VIDEO.feeds().items()}

    with open_task(bundle) as task:
        labels = task.reconstruct(feeds).labels

    assert [type(one) for one in labels] == [Value] * 3


def test_a_classifier_that_does_not_say_what_its_scores_mean_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="scores: none"):
        open_task(write(POINTS, tmp_path, "none"))
