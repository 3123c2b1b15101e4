# SPDX-License-Identifier: Apache-2.0
"""Reports and JUnit say what was measured, and hold nothing that must be fetched; every target that is here is held
against one reference, in one table, with a certificate each.
"""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from perceiver_export.calibration import certify
from perceiver_export.calibration.report.report import check_report_file, gather, junit, render
from perceiver_export.calibration.report.tables import Bar, Report
from perceiver_export.calibration.validation.results import Data, Failure, Validation
from perceiver_export.calibration.validation.statistics import rounded
from perceiver_export.calibration.validation.validation import validate_targets
from perceiver_export.calibration.validation.worst import WorstClass
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.benchmark import Bench, bench
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.presence import devices
from tests.calibration.asked import asked, judged
from tests.calibration.damaged_scales import with_a_scale_times

pytestmark = pytest.mark.usefixtures("one_process_in_module")


@pytest.fixture(scope="module")
def results(int8_bundle: Path, fashion_bundle: Path, thousand: Path) -> tuple[Validation, Validation]:
    held = judged(int8_bundle, thousand, against=fashion_bundle, samples=200, max_drop=8, min_agreement=90)
    open_ = judged(int8_bundle, thousand, against=fashion_bundle, samples=200, max_drop=0.3, min_agreement=90)
    return held, open_


@pytest.fixture(scope="module")
def elsewhere(results: tuple[Validation, Validation]) -> tuple[Validation, ...]:
    """The same, of another machine with the same instructions: a report on them times nothing."""
    return tuple(msgspec.structs.replace(one, machine={**one.machine, "cpu": "another"}) for one in results)


@pytest.fixture(scope="module")
def report(int8_bundle: Path, fashion_bundle: Path, results: tuple[Validation, Validation], thousand: Path) -> Report:
    return gather(int8_bundle, results[:1], fashion_bundle, "perceiver-export validate …", data=thousand)


SECTIONS = (
    "Gates",
    "Accuracy",
    "Latency, memory, size",
    "Most sensitive layers",
    "Worst samples",
    "Slowest layers on ort-cpu",
)


def test_html_holds_everything_and_fetches_nothing(report: Report) -> None:
    page, validation = render(report), report.validations[0]

    for heading in (*SECTIONS, "Folds of model", "Memory plan of model", "Environment"):
        assert f">{heading}</h2>" in page
    for said in (">PASS<", "perceiver-export validate …", "prefers-color-scheme: dark", validation.data.fingerprint):
        assert said in page
    assert validation.worst_samples[0].image in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert not re.findall(r"https?://", page)
    anchors = re.findall(r'href="#([^"]+)"', page)
    assert anchors == re.findall(r'<h2 id="([^"]+)"', page)
    assert not re.findall(r"<script|<svg", page)
    assert len(page) < 300_000
    bars = len(report.gates.rows) + len(report.latency.rows) + len(report.layers.rows)
    assert page.count('<td class="bar">') == bars == 2 + 2 + 15


def test_a_long_answer_is_cut(report: Report) -> None:
    """Of a robot's chunk of actions, an answer is 64 numbers."""
    first = report.validations[0]
    worst = msgspec.structs.replace(first.worst_samples[0], candidate="0.25 " * 64, reference="Bag")
    long = replace(report, validations=(msgspec.structs.replace(first, worst_samples=(worst,)),))

    cells = long.samples.rows[0]
    assert "Bag" in cells
    assert max(map(len, cells)) <= 60
    assert any(cell.startswith("0.25 0.25") for cell in cells)


def test_markdown_is_a_table_a_section(report: Report) -> None:
    lines = render(report, ".md").splitlines()

    assert lines[0] == "## fashion-int8: image-classification, int8: PASS"
    assert "### Gates" in lines
    for number, line in enumerate(lines):
        if line.startswith("| ---"):
            assert len({one.count("|") for one in lines[number - 1 : number + 2]}) == 1


def test_folds_and_plan_are_the_manifests(report: Report, int8_bundle: Path) -> None:
    part = open_bundle(int8_bundle).manifest.parts["model"]
    tables = {table.title: table for table in report.tables}
    text = render(report, ".md")

    folds, plan = tables["Folds of model"], tables["Memory plan of model"]
    assert [(row[0], row[1], row[-1]) for row in folds.rows] == [(one.site, one.chosen, one.why) for one in part.folds]
    encoder = part.folds[0]
    assert encoder.chosen == "folded"
    assert folds.columns[2:4] == ("plain MFLOP>", "folded MFLOP>")
    expected = [f"{flops / 1e6:.2f}" for flops in (encoder.plain.flops, encoder.folded.flops)]
    assert list(folds.rows[0][2:4]) == expected
    assert part.plan is not None
    assert part.plan.stages == ()
    assert plan.rows == [("all of it", "at once", f"{part.plan.peak / 2**20:.2f}")]
    assert f"peak at {part.plan.peak / 2**20:.2f} MiB, of a budget of 512 MiB" in plan.note
    assert f"| {encoder.site} | folded |" in text
    assert "### Memory plan of model" in text


def test_the_most_sensitive_layer_is_measured_on_the_bundle_itself(
    int8_bundle: Path, fashion_bundle: Path, report: Report, elsewhere: Any, thousand: Path, tmp_path: Path
) -> None:
    group = "encoder.self_attentions.0.1.mlp.output"
    ruined = with_a_scale_times(4.0, group, int8_bundle, tmp_path / "ruined")

    damaged = gather(ruined, elsewhere[:1], fashion_bundle, data=thousand)

    assert damaged.sensitivity[0][0] == group
    assert report.sensitivity[0][0] != group
    assert f"| {group} | -9." in render(damaged, ".md")
    recorded = gather(int8_bundle, elsewhere[:1], fashion_bundle)  # without data: what was noted at calibration
    assert recorded.sensitivity_note != damaged.sensitivity_note
    assert {name for name, _ in recorded.sensitivity} == {name for name, _ in report.sensitivity}


@pytest.mark.parametrize("busy", ["", "half of the times lie far apart"])
def test_speed_is_of_the_engines_that_were_validated_and_a_ratio_of_steady_times(
    busy: str, int8_bundle: Path, fashion_bundle: Path, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference was validated in fp32, though an fp16 engine of it was built later."""
    asked: dict[str, Any] = {}

    def take(*sides: Any, **how: Any) -> Bench:
        asked.update(how)
        return msgspec.structs.replace(bench(*sides, **how), unsteady=busy)

    monkeypatch.setattr("perceiver_export.calibration.report.report.bench", take)
    report = gather(int8_bundle, results[:1], fashion_bundle)
    candidate, reference = report.speeds
    page = render(report)

    assert (asked["precision"], asked["against_precision"]) == ("fp32", "fp32")
    # Of the latencies' own note: the page also has the layers' times, which this machine may not take steadily.
    assert ("too unsteady to compare" in report.latency.note) == bool(busy)
    if busy:
        assert f"too unsteady to compare: {busy}" in page
        assert candidate.ratio is None
        return
    assert candidate.ratio is not None
    assert candidate.ratio_quartiles is not None
    low, high = candidate.ratio_quartiles
    assert low <= candidate.ratio <= high
    assert (reference.ratio, reference.ratio_quartiles) == (None, None)
    assert report.latency.rows[0][4:6] == (f"{candidate.ratio:.3f} ×", f"{low:.3f} to {high:.3f}")
    shown = re.findall(r">(-?[\d.]+ ms)<", page)
    assert shown == [f"{value:.2f} ms" for side in report.speeds for value in (side.p50, side.p95)]


def test_only_certificates_of_these_validations_are_shown(
    copied_int8: Path, fashion_bundle: Path, elsewhere: tuple[Validation, ...], thousand: Path
) -> None:
    """Another's is no word on this one, least of all where this one did not hold."""
    certify(copied_int8, [judged(copied_int8, thousand, against=fashion_bundle, samples=150, max_drop=9)])
    (own,) = certify(copied_int8, elsewhere[:1])

    for validations, shown in ((elsewhere[:1], (str(own),)), (elsewhere[1:], ()), (elsewhere, ())):
        assert gather(copied_int8, validations).certificates == shown


def test_targets_of_other_machines_are_neither_timed_nor_profiled(
    int8_bundle: Path, elsewhere: tuple[Validation, ...]
) -> None:
    report = gather(int8_bundle, elsewhere[:1])

    assert report.speeds == ()
    assert not [table.title for table in report.tables if table.title.startswith("Slowest")]


def test_names_of_layers_are_whole_and_bars_as_long_as_the_numbers(report: Report) -> None:
    names = [name for name, _ in report.sensitivity[:15]]
    assert max(map(len, names)) > 38
    assert [row[0] for row in report.layers.rows] == names
    assert all(name in render(report) for name in names)

    few = Report("model", report.validations, sensitivity=(("a", -9.0), ("b", 10.0), ("c", 40.0)))
    assert few.layers.bars == [Bar(0, 0), Bar(0, 25), Bar(0, 100)]


def test_the_bar_of_a_gate_has_its_bounds_measured_value_and_limit(results: tuple[Validation, Validation]) -> None:
    drop = results[0].gates[0]
    bar = Report("model", results[:1]).gates.bars[0]

    least, most = min(drop.lower, 0), max(drop.upper, drop.wanted.limit)
    places = [100 * (value - least) / (most - least) for value in (drop.lower, drop.measured, drop.wanted.limit)]
    assert [bar.left, bar.dot, bar.limit] == pytest.approx(places)
    assert bar.allowed == pytest.approx((0, places[2]))
    assert bar.width == pytest.approx(100 * (drop.upper - drop.lower) / (most - least))


def test_the_report_begins_with_a_plain_sentence_and_its_date(report: Report) -> None:
    drop, agreement, flips = *report.validations[0].gates, report.validations[0].flips
    assert flips is not None
    sentence = report.validations[0].sentence
    page = render(report)

    assert sentence == (
        f"fashion-int8 answered {flips.gained} more and {flips.lost} fewer of 200 correctly than fashion; the loss is "
        f"at most {rounded(drop.upper, '.3f', up=True)} points (8 allowed), the agreement is at least "
        f"{rounded(agreement.lower, '.2f', up=False)} % (90 required)."
    )
    assert 0 < page.index(sentence) < page.index(f"{report.date}, perceiver-export ") < page.index("<h2")
    for one in (report, Report("model", report.validations)):
        assert sentence in render(one, ".md")


def test_without_gates_and_metrics_the_sentence_says_what_was_checked() -> None:
    sentence = Validation("arrays", {"name": "model"}, None, Data("data.npz", 1234, "f")).sentence

    assert all(datum in sentence for datum in ("model", "1,234 samples", "finite"))


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


@pytest.mark.parametrize("verdict", ["undecided", "vacuous", "failed"])
def test_no_other_verdict_is_shown_as_held(verdict: str, results: tuple[Validation, Validation]) -> None:
    """Though the gates of another target held."""
    why = "always answering Bag passes too"
    gates = tuple(msgspec.structs.replace(gate, outcome="vacuous", vacuous=why) for gate in results[0].gates)
    failure = Failure("the candidate gives NaN", "do not ship it")
    other, said, detail = {
        "undecided": (results[1], "NOT ENOUGH DATA: this is not a pass", "samples would decide"),
        "vacuous": (msgspec.structs.replace(results[0], gates=gates), "PROVES NOTHING: this is not a pass", why),
        "failed": (msgspec.structs.replace(results[0], gates=(), failure=failure), ">FAIL<", failure.message),
    }[verdict]
    report = Report("model", (results[0], other))

    assert report.verdict == verdict
    assert said in render(report)
    assert html.escape(detail) in render(report)
    assert detail in render(report, ".md")


def test_names_from_outside_are_text_and_nothing_else(results: tuple[Validation, Validation]) -> None:
    evil = "<script>alert(1)</script>|$x$\x1b[31m\ufffe"
    candidate = {**results[0].candidate, "name": evil, "target": evil}
    validation = msgspec.structs.replace(results[0], candidate=candidate)
    page = render(Report(evil, (validation,), sensitivity=((evil, 1.0),)))

    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 5
    assert "\x1b" not in page
    assert r"\x1b[31m\ufffe" in page


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
    assert "fresh samples" in (error.text or "")
    properties = {one.get("name"): one.get("value") for one in held.iter("property")}
    assert properties["reference target"] == "ort-cpu"
    assert properties["reference model.onnx"] == (results[0].reference or {})["graphs"]["model.onnx"]


def test_worst_samples_have_a_folder_a_target(
    int8_bundle: Path, fashion_bundle: Path, thousand: Path, tmp_path: Path
) -> None:
    present = [device.target for device in devices()]
    folder = tmp_path / "worst"
    options = asked(device="all", against=fashion_bundle, samples=20, worst=2, save_worst=folder)
    validate_targets(int8_bundle, thousand, options)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["worst"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(present)
    for target in present:
        assert len(list((folder / target).glob("*.npz"))) == 2
    with pytest.raises(DataError, match="already exists"):
        validate_targets(int8_bundle, thousand, asked(device="all", samples=3, save_worst=folder))
