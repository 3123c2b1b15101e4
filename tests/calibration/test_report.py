# SPDX-License-Identifier: Apache-2.0
"""Reports and JUnit say what was measured, and hold nothing that must be fetched."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from perceiver_export.calibration import validate
from perceiver_export.calibration.junit import junit
from perceiver_export.calibration.record import read_calibration
from perceiver_export.calibration.report import check_report_file, render_html, render_markdown
from perceiver_export.calibration.report.commands import made_by
from perceiver_export.calibration.report.content import Report
from perceiver_export.calibration.report.gather import gather
from perceiver_export.calibration.report.plots import sensitivity_plot
from perceiver_export.calibration.validated import Failure, Validation
from perceiver_export.calibration.worst import WorstClass
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.manifest import TensorSpec
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


def test_names_of_layers_are_whole(report: Report) -> None:
    names = [name for name, _ in report.sensitivity[:15]]
    assert max(map(len, names)) > 38
    plot = sensitivity_plot(report.sensitivity)
    assert all(f">{name}</text>" in plot for name in names)

    long = "decoder_of_a_name." * 6 + "query"
    assert f">…{long[-53:]}</text>" in sensitivity_plot([(long, 20.0)])


def test_classes_in_which_nothing_changed_are_not_listed(
    report: Report, results: tuple[Validation, Validation]
) -> None:
    rows = [WorstClass("hat", 4, 75.0, 100.0, 1), WorstClass("shoe", 5, 80.0, 80.0, 0)]
    with_reference = msgspec.structs.replace(results[0], worst_classes=tuple(rows))
    alone = [WorstClass("hat", 4, 75.0, None, None), WorstClass("shoe", 5, 100.0, None, None)]
    without = msgspec.structs.replace(results[0], reference=None, worst_classes=tuple(alone))

    table = Report("model", (with_reference,)).classes
    assert [row[0] for row in table.rows] == ["hat"]
    assert table.note.startswith("1 of 2 classes have an answer that differs")
    table = Report("model", (without,)).classes
    assert [row[0] for row in table.rows] == ["hat"]
    assert table.note.startswith("1 of 2 classes have a wrong answer")
    listed = {row[0] for row in report.classes.rows}
    assert listed == {row.label for row in report.validations[0].worst_classes if row.flips}


def test_the_commands_say_what_the_bundle_knows_and_no_more(report: Report, int8_bundle: Path) -> None:
    comment, export_, quantize_, validate_ = report.commands

    assert comment.startswith("#")
    assert "SOURCE was called checkpoint" in comment
    assert export_ == (
        "perceiver-export export SOURCE -o BUNDLE0 --parity huggingface --no-split --memory-budget 512MiB"
    )
    data = shlex.quote(str(TEST.with_name("held_out.npz")))
    assert quantize_.startswith(f"perceiver-export quantize BUNDLE0 --data {data} -o fashion-int8 --scheme int8 ")
    assert "--samples 32" in quantize_
    assert validate_ == "perceiver-export validate …"
    assert "export SOURCE -o BUNDLE0" in render_html(report)

    record = read_calibration(open_bundle(int8_bundle))
    assert record is not None
    other = msgspec.structs.replace(record, smooth=False, precision={"decoder.*": "float"})
    typed = list(made_by(open_bundle(int8_bundle).manifest, other))[-1]
    assert typed.endswith("--no-smooth --precision 'decoder.*=float'")

    nameless = msgspec.structs.replace(record, data=msgspec.structs.replace(record.data, source="an iterable"))
    assert "--data DATA -o" in list(made_by(open_bundle(int8_bundle).manifest, nameless))[-1]


def test_what_was_exported_otherwise_is_typed_otherwise(fashion_bundle: Path) -> None:
    manifest = open_bundle(fashion_bundle).manifest
    part = manifest.parts["model"]
    batch = tuple(
        msgspec.structs.replace(spec, shape=("batch", *spec.shape[1:]), ranges={"batch": (1, 16)})
        for spec in part.inputs
    )
    queries = TensorSpec("queries", "int32", ("batch", 256), "", {"batch": (1, 16)})
    parts = {
        "encoder": msgspec.structs.replace(part, inputs=batch, plan=None),
        "decoder": msgspec.structs.replace(part, inputs=(queries,), plan=None),
    }
    other = msgspec.structs.replace(manifest, source="preset:imagenet-conv (random weights)", parts=parts, parity="own")

    assert list(made_by(other, None))[-1] == (
        "perceiver-export export preset:imagenet-conv -o fashion --batch 1:OPT:16 --split --shape queries=256 --no-fold"
    )


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
