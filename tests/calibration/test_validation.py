# SPDX-License-Identifier: Apache-2.0
"""Validation on the real model and real pictures; gates that hold, and gates that must not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import validate
from perceiver_export.calibration.junit import junit
from perceiver_export.calibration.report import render_html, render_markdown
from perceiver_export.calibration.report.content import Report
from perceiver_export.exporter import export, load_model
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.errors import DataError, GateError, UndecidedError, UsageError
from perceiver_export.runtimes.machine import cpu_name
from perceiver_export.runtimes.report import update_report
from tests.cli import small_models

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"
TEST = FASHION / "test.npz"
README_TOP1 = 0.8672


def test_the_shipped_model_is_as_right_as_the_readme_says(fashion_bundle: Path) -> None:
    result = validate(fashion_bundle, TEST)

    assert result.samples == 10_000
    assert result.top1 is not None
    assert result.top1.value == pytest.approx(README_TOP1, abs=5e-4)  # a few ties fall differently on other CPUs
    assert result.agreement is None


def test_the_bundle_agrees_with_torch(fashion_bundle: Path) -> None:
    model = load_model(FASHION / "checkpoint")

    result = validate(fashion_bundle, TEST, against=model.run, samples=500, max_drop=0.7, min_agreement=99)
    result.require()

    assert result.agreement is not None
    assert result.agreement.count == 500
    assert result.top1 == result.reference_top1
    assert result.drop == 0


def test_every_form_of_data_gives_the_same(fashion_bundle: Path, tmp_path: Path) -> None:
    with np.load(TEST) as data:
        images, labels = data["image"][:20], data["labels"][:20]
    with open_task(fashion_bundle) as task:
        prepared = np.stack([task.preprocess(image) for image in images])
    np.savez(tmp_path / "colour.npz", image=np.repeat(images[..., None], 3, -1), labels=labels)
    np.savez(tmp_path / "prepared.npz", image=prepared, labels=labels)

    expected = validate(fashion_bundle, TEST, samples=20)
    for name in ("colour", "prepared"):
        found = validate(fashion_bundle, tmp_path / f"{name}.npz")
        assert found.metrics == expected.metrics
        assert found.data.fingerprint == expected.data.fingerprint


def test_pictures_with_a_csv(fashion_bundle: Path) -> None:
    result = validate(fashion_bundle, FASHION / "pictures")

    assert result.top1 is not None
    assert result.top1.total == 10


def test_a_ruined_model_does_not_pass(fashion_bundle: Path, ruined: Path) -> None:
    result = validate(ruined, TEST, against=fashion_bundle, samples=500, max_drop=1, min_agreement=95)

    assert [gate.outcome for gate in result.gates] == ["not held", "not held"]
    with pytest.raises(GateError, match="not held: --max-drop 1") as caught:
        result.require()
    assert not isinstance(caught.value, UndecidedError)


def test_worst_samples_and_classes_are_those_that_got_worse(fashion_bundle: Path, ruined: Path, tmp_path: Path) -> None:
    result = validate(ruined, TEST, against=fashion_bundle, samples=200, worst=7, save_worst=tmp_path / "worst")

    top1 = result.metric("top-1")
    assert top1 is not None
    assert top1.lost is not None
    assert top1.lost > 7
    assert len(result.worst_samples) == 7
    for sample in result.worst_samples:  # right before, wrong now
        assert sample.reference == sample.label != sample.candidate
        assert sample.picture.startswith("data:image/png;base64,")
    divergences = [sample.scores["kl"] for sample in result.worst_samples]
    assert divergences == sorted(divergences, reverse=True)
    falls = [(row.reference or 0) - (row.candidate or 0) for row in result.worst_classes]
    assert falls == sorted(falls, reverse=True)
    assert sum(row.samples for row in result.worst_classes) == 200
    assert len(list((tmp_path / "worst").glob("*.png"))) == 7
    listed = json.loads((tmp_path / "worst" / "worst.json").read_bytes())
    assert [row["name"] for row in listed] == [sample.name for sample in result.worst_samples]
    classes = json.loads((tmp_path / "worst" / "classes.json").read_bytes())
    assert [row["label"] for row in classes] == [row.label for row in result.worst_classes]
    with np.load(tmp_path / "worst" / "00.npz") as saved, open_task(ruined) as task:
        logits = task.runtime.run({"image": saved["image"][None]})["logits"][0]
        assert task.labels[int(logits.argmax())] == listed[0]["candidate"]
        assert task.labels[int(saved["target_label"])] == listed[0]["label"]
    with pytest.raises(DataError, match="there already"):
        validate(ruined, TEST, samples=3, save_worst=tmp_path / "worst")


def test_a_gate_is_on_the_bound_and_too_few_samples_decide_nothing(fashion_bundle: Path) -> None:
    result = validate(fashion_bundle, TEST, against=fashion_bundle, samples=50, min_agreement=99, max_drop=1)

    assert result.agreement is not None
    assert result.agreement.value == 1.0
    assert [gate.outcome for gate in result.gates] == ["undecided", "undecided"]
    assert [gate.samples_to_decide for gate in result.gates] == [301, 299]
    with pytest.raises(UndecidedError, match="50 samples cannot tell"):
        result.require()


def test_the_order_of_the_data_changes_nothing(fashion_bundle: Path, tmp_path: Path) -> None:
    with np.load(TEST) as data:
        images, labels = data["image"][:90], data["labels"][:90]
    np.savez(tmp_path / "a.npz", image=images, labels=labels)
    np.savez(tmp_path / "b.npz", image=images[::-1], labels=labels[::-1])

    one, other = (validate(fashion_bundle, tmp_path / f"{name}.npz") for name in "ab")
    assert one.metrics == other.metrics
    assert one.data.fingerprint == other.data.fingerprint
    np.savez(tmp_path / "b.npz", image=images[:-1], labels=labels[:-1])
    assert validate(fashion_bundle, tmp_path / "b.npz").data.fingerprint != one.data.fingerprint


def test_metrics_and_their_change(fashion_bundle: Path, ruined: Path) -> None:
    model = load_model(FASHION / "checkpoint")
    close = validate(fashion_bundle, TEST, against=model.run, samples=60, metric="kl", max_metric_change=0.02)
    same = validate(fashion_bundle, TEST, against=fashion_bundle, samples=60, metric="kl", max_metric_change=0.02)
    worse = validate(ruined, TEST, against=fashion_bundle, samples=60, metric="kl", max_metric_change="0.02")

    assert [gate.outcome for gate in close.gates] == ["held"]
    assert [gate.outcome for gate in same.gates] == ["undecided"]  # 0 for each sample: no bounds
    assert [gate.outcome for gate in worse.gates] == ["not held"]


def test_changes_that_make_no_sense_are_refused_before_anything_runs(fashion_bundle: Path) -> None:
    def never(feeds: Any) -> Any:
        raise AssertionError("it ran")

    for options, message in (
        ({"metric": "agreement", "max_metric_change": 1}, "no change"),
        ({"metric": "kl", "max_metric_change": "2%"}, "no change"),
        ({"metric": "top-1", "max_metric_change": "0%"}, "a share already"),
        ({"max_metric_change": "2%"}, "a share already"),
    ):
        with pytest.raises(UsageError, match=message):
            validate(fashion_bundle, TEST, against=never, samples=3, **options)


def test_nan_outputs_are_a_failure_and_never_a_pass(fashion_bundle: Path) -> None:
    def broken(feeds: Any) -> Any:
        return {"logits": np.full((len(feeds["image"]), 10), np.nan, np.float32)}

    with pytest.raises(GateError, match="NaN"):
        validate(fashion_bundle, TEST, against=broken, samples=5)


def test_what_makes_no_sense_is_refused(fashion_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a reference"):
        validate(fashion_bundle, TEST, max_drop=1)
    for wrong in ({"samples": 0}, {"max_drop": -1}, {"min_agreement": 101}, {"max_metric_change": "much"}):
        with pytest.raises(UsageError):
            validate(fashion_bundle, TEST, against=fashion_bundle, **wrong)
    with pytest.raises(UsageError, match="no metric 'epe'"):
        validate(fashion_bundle, TEST, against=fashion_bundle, metric="epe")
    np.savez(tmp_path / "unlabelled.npz", image=np.zeros((3, 28, 28), np.uint8))
    with pytest.raises(DataError, match="no labels"):
        validate(fashion_bundle, tmp_path / "unlabelled.npz", against=fashion_bundle, max_drop=1)
    np.savez(tmp_path / "nan.npz", image=np.full((3, 3, 28, 28), np.nan, np.float32))
    with pytest.raises(DataError, match="NaN"):
        validate(fashion_bundle, tmp_path / "nan.npz")
    np.savez(tmp_path / "small.npz", image=np.zeros((3, 3, 14, 14), np.float32))
    with pytest.raises(DataError, match="shape"):
        validate(fashion_bundle, tmp_path / "small.npz")


def test_numbers_that_say_little_are_warned_of(fashion_bundle: Path, tmp_path: Path) -> None:
    with np.load(TEST) as data:
        images, labels = data["image"], data["labels"]
    one_class = labels == 3
    np.savez(tmp_path / "one.npz", image=images[one_class][:40], labels=labels[one_class][:40])
    np.savez(tmp_path / "wrong.npz", image=images[:100], labels=(labels[:100].astype(int) + 1) % 10)

    assert validate(fashion_bundle, TEST, samples=40).warnings == ()
    (few,) = validate(fashion_bundle, TEST, samples=3).warnings
    (one,) = validate(fashion_bundle, tmp_path / "one.npz").warnings
    (chance,) = validate(fashion_bundle, tmp_path / "wrong.npz").warnings
    assert few.startswith("only 3 samples")
    assert one.startswith("all samples have one label")
    assert "no better than chance" in chance


def test_a_gate_that_holds_is_not_shown_without_its_reservations(
    fashion_bundle: Path, int8_bundle: Path, tmp_path: Path
) -> None:
    with np.load(TEST) as data:
        images, labels = data["image"][:100], data["labels"][:100]
    with open_task(fashion_bundle) as task:
        twice = np.stack([4 * task.preprocess(image) for image in images])
    np.savez(tmp_path / "few.npz", image=np.tile(images[:40], (5, 1, 1)), labels=np.tile(labels[:40], 5))
    np.savez(tmp_path / "wrong.npz", image=images, labels=(labels.astype(int) + 1) % 10)
    np.savez(tmp_path / "twice.npz", image=twice, labels=labels)

    for name, kind, said in (
        ("few", "repeated", "160 of 200 samples"),
        ("wrong", "chance", "the reference is no better than chance"),
        ("twice", "range", "input 'image' goes from"),
    ):
        result = validate(int8_bundle, tmp_path / f"{name}.npz", against=fashion_bundle, max_drop=40, min_agreement=40)
        assert result.warning_kinds == (kind,)
        for gate in result.gates:
            assert gate.reservations == result.warnings
            assert str(gate).startswith("held: ")
            assert f"; but {said}" in str(gate)
        assert junit([result]).decode().count(f"; but {said}") == 2
        report = Report("model", (result,))
        assert render_markdown(report).startswith("## model: held, with reservations\n\n")
        assert "<strong>Held, with reservations</strong>" in render_html(report)
    clean = validate(int8_bundle, TEST, against=fashion_bundle, samples=200, max_drop=8)
    assert [gate.reservations for gate in clean.gates] == [()]


def test_every_gate_that_fails_is_named(fashion_bundle: Path, ruined: Path) -> None:
    result = validate(ruined, TEST, against=fashion_bundle, samples=200, max_drop=1, min_agreement=95)

    with pytest.raises(GateError, match=r"not held: --max-drop 1: .*; not held: --min-agreement 95: "):
        result.require()


def test_both_sides_run_on_one_target_whatever_auto_is_for_the_reference(
    copied_bundle: Path, fashion_bundle: Path
) -> None:
    update_report(copied_bundle, "bench", {cpu_name(): {"ort-cpu": {"p50": 2.0}, "openvino-cpu": {"p50": 1.0}}})

    for first, second, target in (
        (copied_bundle, fashion_bundle, "openvino-cpu"),
        (fashion_bundle, copied_bundle, "ort-cpu"),
    ):
        result = validate(first, TEST, against=second, samples=3)
        assert (result.candidate["target"], (result.reference or {})["target"]) == (target, target)


def test_labels_on_some_samples_only(fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_labels.py").write_text(
        "import numpy\n"
        "def samples():\n"
        "    for index in range(70):\n"
        "        label = {'label': 1} if index < 64 else {}\n"
        "        yield {'image': numpy.zeros((28, 28), numpy.uint8)} | label\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(DataError, match="some have none"):
        validate(fashion_bundle, "some_labels:samples")
    sys.modules.pop("some_labels", None)


def test_bundles_that_do_not_compare_are_not_compared(fashion_bundle: Path, tmp_path: Path) -> None:
    other = export(small_models.pictures(), tmp_path / "other").path
    larger = export(FASHION / "checkpoint", tmp_path / "larger", shape={"image": (3, 32, 32)}).path

    with pytest.raises(UsageError, match="different labels"):
        validate(fashion_bundle, TEST, against=other)
    with pytest.raises(UsageError, match="prepare inputs differently"):
        validate(fashion_bundle, TEST, against=larger)
