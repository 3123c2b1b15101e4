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

from perceiver_export.calibration.report.report import junit
from perceiver_export.runtimes.errors import BrokenReferenceError, UsageError
from perceiver_export.runtimes.runtime import Array
from tests.calibration.asked import judged, pictures
from tests.cli.commands import fail, perceiver_export, unwrapped

pytestmark = pytest.mark.usefixtures("one_process_in_module")


def test_nan_outputs_are_written_where_machines_and_people_read(
    nan_bundle: Path, fashion_bundle: Path, thousand: Path, tmp_path: Path
) -> None:
    gates, report = tmp_path / "gates.xml", tmp_path / "report.md"
    options = ["--samples", "20", "--min-agreement", "50", "--certify", "--json"]
    files: list[str | Path] = ["--against", fashion_bundle, "--junit", gates, "--report", report]

    done = perceiver_export("validate", nan_bundle, "--data", thousand, *files, *options)

    assert done.returncode == 1
    message = unwrapped(done.stderr).splitlines()[0].removeprefix("error: ")
    assert message == "the candidate (fashion on ort-cpu) gives NaN or infinite values for test.npz[0]"
    found = json.loads(done.stdout)
    assert (found["failure"]["message"], found["metrics"], found["gates"]) == (message, [], [])
    (suite,) = ElementTree.parse(gates).getroot().findall("testsuite")
    assert [suite.get(name) for name in ("tests", "failures", "errors")] == ["1", "1", "0"]
    failure = suite.find("testcase[@name='outputs are finite']/failure")
    assert failure is not None
    assert failure.get("message") == message
    first, *lines = report.read_text(encoding="utf-8").splitlines()
    assert first.endswith(": FAIL")
    assert any(message in line for line in lines)
    assert not (nan_bundle / "calibration.json").exists()


def test_what_may_not_be_certified_is_reported_all_the_same(
    int8_bundle: Path, fashion_bundle: Path, tmp_path: Path
) -> None:
    data, report = pictures(tmp_path / "one.npz", slice(0, 40), of_class=3), tmp_path / "report.md"

    options: list[str | Path] = ["--against", fashion_bundle, "--max-drop", "20", "--certify", "--report", report]
    said = fail("validate", int8_bundle, "--data", data, *options)

    assert "error: PROVES NOTHING top-1 drop ≤ 20 points" in said
    assert "Certified" not in report.read_text(encoding="utf-8")
    assert "all samples have the same label" in report.read_text(encoding="utf-8")


def test_a_reference_that_gives_nan_fails_too_and_is_never_held(fashion_bundle: Path, thousand: Path) -> None:
    def broken(feeds: Any) -> Any:
        return {"logits": np.full((len(feeds["image"]), 10), np.nan, np.float32)}

    result = judged(fashion_bundle, thousand, against=broken, samples=100, min_agreement=90, keep_failures=True)

    assert (result.held, result.samples) == (False, 0)
    with pytest.raises(BrokenReferenceError, match=r"the reference \(the reference on a function\) gives NaN"):
        result.require()
    assert b"the reference on a function) gives NaN" in junit([result])
    with pytest.raises(BrokenReferenceError):
        judged(fashion_bundle, thousand, against=broken, samples=5)


def test_an_error_in_the_middle_leaves_no_file(fashion_bundle: Path, tmp_path: Path) -> None:
    images = np.zeros((100, 3, 28, 28), np.float32)
    images[80] = np.nan
    np.savez(tmp_path / "data.npz", image=images)
    files = {"--junit": "gates.xml", "--report": "a.html", "--save-worst": "worst"}
    options = [word for option, name in files.items() for word in (option, str(tmp_path / name))]

    assert "data.npz[80]: 'image' contains NaN" in fail(
        "validate", fashion_bundle, "--data", tmp_path / "data.npz", *options
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


@pytest.mark.parametrize("outputs", [{"scores": np.zeros((3, 10))}, {"logits": np.zeros((3, 1))}])
def test_a_reference_that_gives_something_else_is_refused(
    outputs: dict[str, Array], fashion_bundle: Path, thousand: Path
) -> None:
    with pytest.raises(UsageError, match=r"the reference gives {'(scores|logits)'.*, the candidate {'logits'"):
        judged(fashion_bundle, thousand, against=lambda feeds: outputs, samples=3)


def test_a_metric_of_ones_own_needs_no_labels_unless_it_reads_them(
    fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_targets.py").write_text(
        "def mean(outputs, targets): return float(outputs['logits'].mean())\n"
        "def later(outputs, targets): return float(targets['label'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_targets", raising=False)
    np.savez(tmp_path / "data.npz", image=np.zeros((3, 28, 28), np.uint8))

    own = judged(fashion_bundle, tmp_path / "data.npz", metric="odd_targets:mean")
    assert [metric.name for metric in own.metrics] == ["odd_targets:mean"]
    with pytest.raises(UsageError, match="odd_targets:later failed: KeyError"):
        judged(fashion_bundle, tmp_path / "data.npz", metric="odd_targets:later")


def test_a_script_that_ends_the_program_ends_no_command(
    fashion_bundle: Path, thousand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`validate` ended with 0, as if its gates held."""
    (tmp_path / "script.py").write_text("import sys\ndef samples(): yield {}\nsys.exit(0)\n")
    (tmp_path / "metric.py").write_text("import sys\ndef leaves(outputs, targets): sys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    command: list[str | Path] = ["validate", fashion_bundle, "--against", fashion_bundle, "--samples", "2"]

    said = fail(*command, "--data", "script:samples", "--max-drop", "1")
    assert "script:samples cannot be imported: SystemExit(0)" in said
    own = ["--metric", "metric:leaves", "--max-metric-change", "1"]
    assert "metric:leaves failed: SystemExit: 0" in fail(*command, "--data", thousand, *own)
