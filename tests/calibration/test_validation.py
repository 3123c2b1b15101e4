# SPDX-License-Identifier: Apache-2.0
"""Validation on the real model and real pictures; gates that hold, and gates that must not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from perceiver_export.calibration import Gates, validate
from perceiver_export.calibration.report.report import junit, render
from perceiver_export.calibration.report.tables import Report
from perceiver_export.exporter import load_model
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.bundle import change_report
from perceiver_export.runtimes.errors import DataError, GateError, UndecidedError, UsageError
from perceiver_export.runtimes.machine import cpu_name
from tests.calibration.asked import TEST, judged, pictures, value
from tests.conftest import FASHION
from tests.runtimes.targets import latencies

README_TOP1 = 88.50


def test_the_shipped_model_is_as_right_as_the_readme_says(batched_bundle: Path) -> None:
    result = validate(batched_bundle, TEST)

    assert result.samples == 10_000
    assert value(result, "top-1") == pytest.approx(README_TOP1, abs=0.05)  # a few ties fall differently on other CPUs
    assert [metric.name for metric in result.metrics] == ["top-1", "top-5"]


def test_the_bundle_agrees_with_torch(fashion_bundle: Path, thousand: Path) -> None:
    model = load_model(FASHION / "checkpoint")

    result = judged(fashion_bundle, thousand, against=model.run, samples=500, max_drop=0.7, min_agreement=99)
    result.require()

    (top1, _, agreement, _) = result.metrics
    assert top1.worsening is not None
    assert (agreement.candidate.value, top1.worsening.value, top1.candidate) == (100, 0, top1.reference)


def test_every_form_and_order_of_data_gives_the_same(fashion_bundle: Path, tmp_path: Path) -> None:
    with np.load(pictures(tmp_path / "data.npz", slice(0, 10_000, 500))) as data:
        images, labels = data["image"], data["labels"]
    with open_task(fashion_bundle) as task:
        prepared = np.stack([task.preprocess(image) for image in images])
    np.savez(tmp_path / "colour.npz", image=np.repeat(images[..., None], 3, -1), labels=labels)
    np.savez(tmp_path / "prepared.npz", image=prepared, labels=labels)
    np.savez(tmp_path / "backwards.npz", image=images[::-1], labels=labels[::-1])

    expected = judged(fashion_bundle, TEST, samples=20)
    for name in ("data", "colour", "prepared", "backwards"):
        found = validate(fashion_bundle, tmp_path / f"{name}.npz")
        assert (found.metrics, found.data.fingerprint) == (expected.metrics, expected.data.fingerprint)
    for other in (
        pictures(tmp_path / "fewer.npz", slice(0, 9_500, 500)),
        pictures(tmp_path / "others.npz", slice(0, 10_000, 500), shift=1),
    ):
        assert validate(fashion_bundle, other).data.fingerprint != expected.data.fingerprint
    assert validate(fashion_bundle, FASHION / "images").samples == 10


def test_a_ruined_model_does_not_pass_and_every_gate_that_fails_is_named(
    fashion_bundle: Path, ruined: Path, thousand: Path
) -> None:
    result = judged(ruined, thousand, against=fashion_bundle, samples=500, max_drop=1, min_agreement=95)

    assert [gate.outcome for gate in result.gates] == ["not held", "not held"]
    with pytest.raises(GateError, match=r"FAIL  top-1 drop ≤ 1 .*; FAIL  agreement ≥ 95 %") as caught:
        result.require()
    assert not isinstance(caught.value, UndecidedError)


def test_worst_samples_and_classes_are_those_that_got_worse(
    fashion_bundle: Path, ruined: Path, thousand: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "worst"
    result = judged(ruined, thousand, against=fashion_bundle, samples=200, worst=7, save_worst=folder)

    assert (result.metrics[0].lost or 0) > 7
    assert len(result.worst_samples) == len(list(folder.glob("*.png"))) == 7
    for sample in result.worst_samples:  # right before, wrong now
        assert sample.reference == sample.label != sample.candidate
        assert sample.image.startswith("data:image/png;base64,")
    divergences = [sample.scores["kl"] for sample in result.worst_samples]
    assert divergences == sorted(divergences, reverse=True)
    falls = [(row.reference or 0) - (row.candidate or 0) for row in result.worst_classes]
    assert falls == sorted(falls, reverse=True)
    assert sum(row.samples for row in result.worst_classes) == 200
    listed, classes = (json.loads((folder / f"{name}.json").read_bytes()) for name in ("worst", "classes"))
    assert [row["name"] for row in listed] == [sample.name for sample in result.worst_samples]
    assert [row["label"] for row in classes] == [row.label for row in result.worst_classes]
    with np.load(folder / "00.npz") as saved, open_task(ruined) as task:
        logits = task.runtime.run({"image": saved["image"][None]})["logits"][0]
        assert task.labels[int(logits.argmax())] == listed[0]["candidate"]
        assert task.labels[int(saved["target_label"])] == listed[0]["label"]
    with pytest.raises(DataError, match="already exists"):
        judged(ruined, thousand, samples=3, save_worst=folder)


def test_metrics_and_their_change(fashion_bundle: Path, ruined: Path, thousand: Path) -> None:
    model = load_model(FASHION / "checkpoint")
    for candidate, against, outcome in (
        (fashion_bundle, model.run, "held"),
        (fashion_bundle, fashion_bundle, "undecided"),  # 0 for each sample: no bounds
        (ruined, fashion_bundle, "not held"),
    ):
        result = judged(candidate, thousand, against=against, samples=60, metric="kl", max_metric_change=0.02)
        assert [gate.outcome for gate in result.gates] == [outcome]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"max_drop": value} for value in (-1, 100)),  # 100: every candidate passes
        *({"min_agreement": value} for value in (0, 101, float("nan"))),
        *({"max_metric_change": value} for value in ("much", "inf", "-1%")),
        *({"min_agreement": value} for value in (0.97, 0.005, 1)),  # a share, where a percentage is asked for
    ],
)
def test_gates_without_meaning_are_refused_when_they_are_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        Gates(**wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "agreement", "max_metric_change": 1}, "cannot get worse"),
        ({"metric": "kl", "max_metric_change": "2%"}, "a distance"),
        ({"metric": "top-1", "max_metric_change": "0%"}, "a share already"),
        ({"max_metric_change": "2%"}, "a share already"),
        ({"metric": "epe"}, "no metric 'epe'"),
        ({"samples": 0}, "samples"),
        ({"against": None, "max_drop": 1}, "needs a reference"),
    ],
)
def test_options_without_meaning_are_refused_before_anything_runs(
    options: dict[str, Any], message: str, fashion_bundle: Path
) -> None:
    def never(feeds: Any) -> Any:
        raise AssertionError("it ran")

    with pytest.raises(UsageError, match=message):
        judged(fashion_bundle, TEST, **{"against": never, "samples": 3, **options})


def test_data_without_labels_is_judged_by_agreement_only_and_says_so(fashion_bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", image=np.load(TEST)["image"][:40])
    result = judged(fashion_bundle, tmp_path / "data.npz", against=fashion_bundle, min_agreement=80)

    assert "the data has no `label`" in dict(zip(result.warning_kinds, result.warnings, strict=True))["unlabelled"]
    assert not any("`label`" in one for one in result.gates[0].reservations)
    with pytest.raises(DataError, match="top-1 was not measured"):
        judged(fashion_bundle, tmp_path / "data.npz", against=fashion_bundle, max_drop=1)


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        ({"rows": slice(0, 40)}, "", ""),
        ({"rows": slice(0, 3)}, "few", "only 3 samples"),
        ({"rows": slice(0, 40), "of_class": 3}, "one label", "all samples have the same label"),
        ({"rows": slice(0, 100), "shift": 1}, "chance", "the model is no better than chance"),
    ],
)
def test_numbers_that_say_little_are_warned_of(
    data: dict[str, Any], kind: str, said: str, fashion_bundle: Path, tmp_path: Path
) -> None:
    result = validate(fashion_bundle, pictures(tmp_path / "data.npz", **data))

    assert result.warning_kinds == ((kind,) if kind else ())
    assert "".join(result.warnings).startswith(said)


def test_samples_of_sorted_data_are_of_all_labels(fashion_bundle: Path, tmp_path: Path) -> None:
    with np.load(TEST) as data:
        order = np.argsort(data["labels"][:500], kind="stable")
    found = judged(fashion_bundle, pictures(tmp_path / "sorted.npz", order), samples=40)
    assert (len(found.data.labels), sum(found.data.labels.values()), found.warnings) == (10, 40, ())

    found = judged(fashion_bundle, pictures(tmp_path / "two.npz", order[:90]), samples=40)
    assert found.data.labels.keys() == {"T-shirt/top", "Trouser"}
    assert found.warning_kinds == ("unseen",)
    assert "2 of the model's 10 labels" in found.warnings[0]


@pytest.mark.parametrize(
    ("kind", "said"),
    [("repeated", "160 of 200 samples"), ("chance", "the reference is no better"), ("range", "input 'image' is in")],
)
def test_a_gate_that_holds_is_not_shown_without_its_reservations(
    kind: str, said: str, fashion_bundle: Path, int8_bundle: Path, tmp_path: Path
) -> None:
    rows = np.tile(np.arange(40), 5) if kind == "repeated" else np.arange(100)
    data = pictures(tmp_path / "data.npz", rows, shift=int(kind == "chance"))
    if kind == "range":
        with np.load(data) as arrays, open_task(fashion_bundle) as task:
            twice = np.stack([4 * task.preprocess(image) for image in arrays["image"]])
            np.savez(data, image=twice, labels=arrays["labels"])

    result = judged(int8_bundle, data, against=fashion_bundle, max_drop=20, min_agreement=80)
    assert result.warning_kinds == (kind,)
    # Spoiled data is easily guessed, and int8 loses on it: only gates that hold have reservations.
    result = msgspec.structs.replace(result, gates=tuple(gate for gate in result.gates if gate.held))
    assert result.gates
    for gate in result.gates:
        assert gate.reservations == result.warnings
        assert str(gate).startswith("PASS  ")
        assert f"; but {said}" in str(gate)
    assert junit([result]).decode().count(f"; but {said}") == len(result.gates)
    report = Report("model", (result,))
    assert render(report, ".md").startswith("## model: PASS, with reservations\n\n")
    assert "<strong>PASS, with reservations</strong>" in render(report)


def test_both_sides_run_on_one_target_whatever_auto_is_for_the_reference(
    copied_bundle: Path, fashion_bundle: Path, thousand: Path
) -> None:
    times = latencies(ort_cpu=2.0, openvino_cpu=1.0)
    change_report(copied_bundle, "bench", lambda _: {cpu_name(): times})

    for first, second, target in (
        (copied_bundle, fashion_bundle, "openvino-cpu"),
        (fashion_bundle, copied_bundle, "ort-cpu"),
    ):
        result = judged(first, thousand, against=second, samples=3)
        assert (result.candidate["target"], (result.reference or {})["target"]) == (target, target)


def test_labels_on_some_samples_only(fashion_bundle: Path) -> None:
    """The first batch has them all."""
    image = np.zeros((28, 28), np.uint8)
    data = [{"image": image, **({"label": 1} if index < 64 else {})} for index in range(70)]

    with pytest.raises(DataError, match=r"only some samples have a label: the data\[64\] has none"):
        judged(fashion_bundle, data)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [('"Bag"', '"Sack"', "labels"), ('"resample": "bicubic"', '"resample": "bilinear"', "preprocessing")],
)
def test_bundles_that_do_not_compare_are_not_compared(
    old: str, new: str, said: str, fashion_bundle: Path, edit_manifest: Callable[[str, str], Path]
) -> None:
    with pytest.raises(UsageError, match=said):
        judged(edit_manifest(old, new), TEST, against=fashion_bundle)
