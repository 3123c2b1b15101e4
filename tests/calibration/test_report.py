# SPDX-License-Identifier: Apache-2.0
"""Reports and JUnit say what was measured, and hold nothing that must be fetched."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from perceiver_export.calibration import validate
from perceiver_export.calibration.junit import junit
from perceiver_export.calibration.report import check_report_file, render_html, render_markdown
from perceiver_export.calibration.report.content import Report
from perceiver_export.calibration.report.gather import gather
from perceiver_export.calibration.validated import Failure, Validation
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.errors import UsageError
from tests.calibration.damaged_scales import with_a_scale_times

TEST = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist" / "test.npz"


@pytest.fixture(scope="module")
def results(int8_bundle: Path, fashion_bundle: Path) -> tuple[Validation, Validation]:
    held = validate(int8_bundle, TEST, against=fashion_bundle, samples=200, max_drop=8, min_agreement=90)
    open_ = validate(int8_bundle, TEST, against=fashion_bundle, samples=200, max_drop=0.3, min_agreement=90)
    return held, open_


@pytest.fixture(scope="module")
def report(int8_bundle: Path, fashion_bundle: Path, results: tuple[Validation, Validation]) -> Report:
    return gather(int8_bundle, results[:1], fashion_bundle, ["perceiver-export validate …"])


def test_html_holds_everything_and_fetches_nothing(report: Report) -> None:
    page = render_html(report)

    for expected in (
        ">Held<",
        "<h2>Gates</h2>",
        "<h2>Accuracy</h2>",
        "<h2>Latency, memory, size</h2>",
        "<h2>Sensitivity by layer</h2>",
        "<h2>Worst samples</h2>",
        "<h2>Kernel coverage</h2>",
        "<h2>Speed against fp32</h2>",
        "<h2>Folds</h2>",
        "<h2>Memory plan</h2>",
        "<h2>Environment</h2>",
        "<h2>Reproduce</h2>",
        "prefers-color-scheme: dark",
        report.validations[0].data.fingerprint,
        report.validations[0].worst_samples[0].picture,
    ):
        assert expected in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    assert "<script" not in page
    assert len(page) < 300_000
    assert page.count("<svg") == 3
    assert "#0102" not in page  # every colour is the page's


def test_markdown_is_a_table_a_section(report: Report) -> None:
    text = render_markdown(report)

    lines = text.splitlines()
    assert lines[0] == "## fashion-int8: image-classification, int8: held"
    assert "### Gates" in lines
    for number, line in enumerate(lines):
        if line.startswith("| ---"):
            columns = line.count("|")
            assert lines[number - 1].count("|") == columns
            assert lines[number + 1].count("|") == columns


def test_folds_and_plan_are_the_manifests(report: Report, int8_bundle: Path) -> None:
    part = open_bundle(int8_bundle).manifest.parts["model"]
    tables = {table.title: table for table in report.tables}
    text = render_markdown(report)

    folds, plan = tables["Folds"], tables["Memory plan"]
    assert [(row[0], row[1], row[-1]) for row in folds.rows] == [(one.site, one.chosen, one.why) for one in part.folds]
    encoder = part.folds[0]
    assert encoder.chosen == "folded"
    assert folds.columns[2:4] == ("plain MFLOP>", "folded MFLOP>")
    expected = [f"{flops / 1e6:.2f}" for flops in (encoder.plain.flops, encoder.folded.flops)]
    assert list(folds.rows[0][2:4]) == expected
    assert part.plan is not None
    assert [row[1] for row in plan.rows] == [stage.stage for stage in part.plan.stages]
    assert plan.rows[0][2] == "32 of 32 latents"
    assert f"peak at {part.plan.peak / 2**20:.2f} MiB, of a budget of 512 MiB" in plan.note
    assert f"| {encoder.site} | folded |" in text
    assert "### Memory plan" in text


def test_the_most_sensitive_layer_is_measured_on_the_bundle_itself(
    int8_bundle: Path, fashion_bundle: Path, report: Report, results: tuple[Validation, Validation], tmp_path: Path
) -> None:
    group = "encoder.self_attentions.0.1.mlp.output"
    ruined = with_a_scale_times(4.0, group, int8_bundle, tmp_path / "ruined")

    damaged = gather(ruined, results[:1], fashion_bundle)

    assert damaged.sensitivity[0][0] == group
    assert report.sensitivity[0][0] != group
    assert f"| {group} | -9." in render_markdown(damaged)
    recorded = gather(int8_bundle, results[:1])  # without the reference: what was noted at calibration
    assert recorded.sensitivity_note != damaged.sensitivity_note
    assert {name for name, _ in recorded.sensitivity} == {name for name, _ in report.sensitivity}


def test_undecided_is_never_shown_as_held(report: Report, results: tuple[Validation, Validation]) -> None:
    undecided = Report("model", (results[0], results[1]))

    assert undecided.verdict == "undecided"
    assert "Undecided: this is not a pass" in render_html(undecided)
    assert "samples would decide" in render_markdown(undecided)


def test_a_failure_on_one_target_is_never_shown_as_held(results: tuple[Validation, Validation]) -> None:
    failure = Failure("the candidate gives NaN", "such a model must not be shipped")
    report = Report("model", (results[0], msgspec.structs.replace(results[0], gates=(), failure=failure)))
    page = render_html(report)

    assert report.verdict == "failed"
    assert "<strong>Failed</strong>" in page
    assert "Warning: the candidate gives NaN" in page


def test_names_from_outside_are_text_and_nothing_else(results: tuple[Validation, Validation]) -> None:
    evil = "<script>alert(1)</script>|$x$"
    candidate = {**results[0].candidate, "name": evil, "target": evil}
    page = render_html(Report(evil, (msgspec.structs.replace(results[0], candidate=candidate),)))

    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_reports_are_html_or_markdown() -> None:
    check_report_file(Path("a.html"))
    check_report_file(Path("a.md"))
    with pytest.raises(UsageError, match=r"\.pdf"):
        check_report_file(Path("a.pdf"))


def test_junit_has_a_case_a_gate(results: tuple[Validation, Validation]) -> None:
    root = ElementTree.fromstring(junit(results))

    held, undecided = root.findall("testsuite")
    assert (held.get("tests"), held.get("failures"), held.get("errors")) == ("3", "0", "0")
    assert (undecided.get("tests"), undecided.get("failures"), undecided.get("errors")) == ("3", "0", "1")
    error = undecided.find("testcase/error")
    assert error is not None
    assert error.get("type") == "undecided"
    assert "samples would decide" in (error.text or "")
    properties = {one.get("name"): one.get("value") for one in held.iter("property")}
    assert properties["reference target"] == "ort-cpu"
    assert properties["reference model.onnx"] == (results[0].reference or {})["graphs"]["model.onnx"]
