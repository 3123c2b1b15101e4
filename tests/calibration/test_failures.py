# SPDX-License-Identifier: Apache-2.0
"""Validations that come to no end: NaN outputs are written down as a failure, errors leave nothing behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from perceiver_export.calibration import validate
from perceiver_export.calibration.junit import junit
from perceiver_export.runtimes.errors import DataError, GateError, UsageError
from tests.cli.commands import fail, perceiver_export

TEST = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist" / "test.npz"


def test_nan_outputs_are_written_where_machines_and_people_read(
    nan_bundle: Path, fashion_bundle: Path, tmp_path: Path
) -> None:
    gates, report = tmp_path / "gates.xml", tmp_path / "report.md"
    options = ["--samples", "20", "--min-agreement", "50", "--certify", "--json"]

    done = perceiver_export(
        "validate",
        nan_bundle,
        "--data",
        TEST,
        "--against",
        fashion_bundle,
        *options,
        "--junit",
        gates,
        "--report",
        report,
    )

    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    message = error.removeprefix("error: ")
    assert message == "the candidate (fashion on ort-cpu) gives NaN or infinite values for test.npz[0]"
    assert hint == "hint: such a model must not be shipped"
    found = json.loads(done.stdout)
    assert found["failure"]["message"] == message
    assert (found["metrics"], found["gates"]) == ([], [])
    (suite,) = ElementTree.parse(gates).getroot().findall("testsuite")
    assert [suite.get(name) for name in ("tests", "failures", "errors")] == ["1", "1", "0"]
    failure = suite.find("testcase[@name='outputs are finite']/failure")
    assert failure is not None
    assert failure.get("message") == message
    lines = report.read_text(encoding="utf-8").splitlines()
    assert lines[0].endswith(": failed")
    assert any(message in line for line in lines[1:])
    assert not (nan_bundle / "calibration.json").exists()


def test_what_may_not_be_certified_is_reported_all_the_same(
    int8_bundle: Path, fashion_bundle: Path, tmp_path: Path
) -> None:
    with np.load(TEST) as data:
        one = data["labels"] == 3
        np.savez(tmp_path / "one.npz", image=data["image"][one][:40], labels=data["labels"][one][:40])
    report = tmp_path / "report.md"

    options: list[str | Path] = ["--against", fashion_bundle, "--max-drop", "30", "--certify", "--report", report]
    said = fail("validate", int8_bundle, "--data", tmp_path / "one.npz", *options)

    assert "error: all samples have one label" in said
    assert "Certified" not in report.read_text(encoding="utf-8")
    assert "all samples have one label" in report.read_text(encoding="utf-8")


def test_a_reference_that_gives_nan_fails_too_and_is_never_held(fashion_bundle: Path) -> None:
    def broken(feeds: Any) -> Any:
        return {"logits": np.full((len(feeds["image"]), 10), np.nan, np.float32)}

    result = validate(fashion_bundle, TEST, against=broken, samples=100, min_agreement=1, keep_failures=True)

    assert result.failure is not None
    assert not result.held
    assert result.samples == 0
    with pytest.raises(GateError, match=r"the reference \(the reference on a function\) gives NaN"):
        result.require()
    assert b"the reference on a function) gives NaN" in junit([result])


def test_an_error_in_the_middle_leaves_no_file(fashion_bundle: Path, tmp_path: Path) -> None:
    images = np.zeros((100, 3, 28, 28), np.float32)
    images[80] = np.nan
    np.savez(tmp_path / "data.npz", image=images)
    files = {"--junit": "gates.xml", "--report": "a.html", "--save-worst": "worst"}
    options = [word for option, name in files.items() for word in (option, str(tmp_path / name))]

    said = fail("validate", fashion_bundle, "--data", tmp_path / "data.npz", *options)

    assert "data.npz[80]" in said
    assert "NaN" in said
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_a_reference_that_gives_something_else_is_refused(fashion_bundle: Path) -> None:
    def scores(feeds: Any) -> Any:
        return {"scores": np.zeros((len(feeds["image"]), 10), np.float32)}

    def one_label(feeds: Any) -> Any:
        return {"logits": np.zeros((len(feeds["image"]), 1), np.float32)}

    with pytest.raises(UsageError, match="gives no 'logits', it gives scores"):
        validate(fashion_bundle, TEST, against=scores, samples=3)
    with pytest.raises(UsageError, match=r"of shape \[3, 1\], the candidate \[3, 10\]"):
        validate(fashion_bundle, TEST, against=one_label, samples=3)


def test_targets_that_judge_nothing_are_named(
    fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_targets.py").write_text(
        "import numpy\n"
        "def mean(outputs, targets):\n"
        "    return float(outputs['logits'].mean())\n"
        "def later(outputs, targets):\n"
        "    return float(targets['label'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with np.load(TEST) as data:
        images, labels = data["image"][:100], data["labels"][:100]
    np.savez(tmp_path / "unlabelled.npz", image=images)

    own = validate(fashion_bundle, tmp_path / "unlabelled.npz", metric="odd_targets:mean")
    assert [metric.name for metric in own.metrics] == ["odd_targets:mean"]
    with pytest.raises(UsageError, match="odd_targets:later failed: KeyError"):
        validate(fashion_bundle, tmp_path / "unlabelled.npz", metric="odd_targets:later")
    np.savez(tmp_path / "other.npz", image=images, labels=(labels.astype(int) + 1) % 10)
    np.savez(tmp_path / "same.npz", image=images, labels=labels)
    one, other = (validate(fashion_bundle, tmp_path / f"{name}.npz") for name in ("same", "other"))
    assert one.data.fingerprint != other.data.fingerprint  # equal pictures, other labels
    sys.modules.pop("odd_targets", None)
    with pytest.raises(DataError, match="no labels"):
        validate(fashion_bundle, tmp_path / "unlabelled.npz", against=fashion_bundle, max_drop=1)
