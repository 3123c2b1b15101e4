# SPDX-License-Identifier: Apache-2.0
"""`build`, `bench --device all`, `package` and `doctor` as a user types them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from perceiver_export.runtimes import benchmark, build, load
from perceiver_export.runtimes.engines import openvino, ort
from tests.cli.commands import fail, succeed, unwrapped
from tests.conftest import FASHION

TARGETS = ("ort-cpu", "openvino-cpu")


def test_build_compiles_for_every_target_named_and_load_finds_it(copied_bundle: Path) -> None:
    options = [word for target in TARGETS for word in ("--target", target)]
    built = json.loads(succeed("build", copied_bundle, *options, "--json"))

    assert [(one["target"], one["part"], one["new"]) for one in built] == [(name, "model", True) for name in TARGETS]
    for one in built:
        with load(copied_bundle, one["target"]) as runtime:
            assert runtime.describe()["compiled"] == one["directory"]
    assert "ort-cpu, part model, fp32: already built" in succeed("build", copied_bundle, "--target", "ort-cpu")


@pytest.mark.usefixtures("one_process")
def test_the_engine_built_last_is_taken_and_named_or_the_one_that_is_asked_for(
    copied_bundle: Path, thousand: Path
) -> None:
    for precision in ("fp32", "fp16"):
        build(copied_bundle, "openvino-cpu", precision=precision)
    where, data = ["--device", "openvino-cpu"], ["--data", str(thousand), "--samples", "3", "--json"]

    for asked, taken in (([], "fp16"), (["--precision", "fp32"], "fp32")):
        shown = succeed("run", copied_bundle, FASHION / "images" / "coat.png", *where, *asked)
        assert f", CPU, {taken}" in " ".join(shown.split())
        measured = json.loads(succeed("bench", copied_bundle, "--runs", "5", "--json", *where, *asked))
        assert measured["measurements"][0]["precision"] == taken
        validated = json.loads(succeed("validate", copied_bundle, *data, *where, *asked))
        assert validated["candidate"]["precision"] == taken


def test_lowered_graphs_are_told_to_machines_too(copied_bundle: Path) -> None:
    options = ["--target", "tensorrt", "--precision", "fp16", "--lower-only"]
    lowered = json.loads(succeed("build", copied_bundle, *options, "--json"))

    assert [one["name"] for one in lowered] == ["tensorrt-fp16"]
    assert all((copied_bundle / file).is_file() for one in lowered for file in one["files"])
    assert min(lowered[0]["sqnr"].values()) > 60
    told = succeed("build", copied_bundle, *options)
    assert told.count("dB SQNR") == 1


@pytest.mark.usefixtures("one_process")
def test_bench_of_all_targets_is_a_table_and_a_csv_file(copied_bundle: Path, tmp_path: Path) -> None:
    table = succeed("bench", copied_bundle, "--device", "all", "--runs", "5", "--csv", tmp_path / "figures.csv")
    with (tmp_path / "figures.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    assert all(target in table for target in TARGETS)
    assert [row["target"] for row in rows] == list(TARGETS)
    assert all(0 < float(row["p50"]) <= float(row["p99"]) and float(row["difference"]) < 1e-4 for row in rows)


@pytest.mark.usefixtures("one_process")
def test_bench_of_precisions_says_that_there_is_no_other_only_where_none_was_skipped(
    copied_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("bench", copied_bundle, "--device", "ort-cpu", "--precision", "auto", "--runs", "5")
    shown = succeed(*asked)
    assert "no lower precision" in shown
    assert "size" in shown
    monkeypatch.setattr(ort, "precisions", lambda target: ("bf16",))  # which it then refuses
    shown = succeed(*asked)
    assert "no lower precision" not in shown
    assert "not measured: ort-cpu in bf16" in unwrapped(shown)


@pytest.mark.usefixtures("one_process")
def test_precisions_are_a_table_of_80_columns_and_a_csv_file_with_what_is_decided(
    copied_bundle: Path, fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(copied_bundle, "openvino-cpu", flags={"NUM_STREAMS": "2"})
    monkeypatch.setattr(openvino, "precisions", lambda target: ("fp16",))
    monkeypatch.setenv("COLUMNS", "80")
    sides, csv_ = ("--against", fashion_bundle, "--device", "openvino-cpu"), tmp_path / "figures.csv"
    for why in ("", "busy"):
        monkeypatch.setattr(benchmark, "scattered", lambda *_, why=why: why)
        shown = succeed("bench", copied_bundle, *sides, "--precision", "auto", "--runs", "20", "--csv", csv_)
        rows = list(csv.DictReader(csv_.read_text(encoding="utf-8").splitlines()))
        title, _, shown = shown.partition("; all on openvino-cpu\n")
        table = shown.partition("ms (spread): ")[0]

        assert (title.count("\n"), table.count("──") > 0, table.count("uncertified")) == (0, True, 4)
        assert max(map(len, table.splitlines())) <= 80
        assert ("fastest\n" in table or "tie\n" in table) == (not why)
        assert [row["flags"] for row in rows] == ["NUM_STREAMS=2", "", "", ""]
        assert [row["unsteady"] for row in rows] == [why] * 4
        assert ("True" in [row["fastest"] for row in rows]) == (not why)


@pytest.mark.usefixtures("one_process")
def test_build_of_the_fastest_tells_machines_what_was_measured_and_people_nothing_twice(
    copied_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("build", copied_bundle, "--target", "openvino-cpu", "--precision", "auto")
    monkeypatch.setattr(openvino, "precisions", lambda target: ("fp16",))
    monkeypatch.setattr(benchmark, "scattered", lambda *_: "busy")
    document = json.loads(succeed(*asked, "--json"))
    assert [one["precision"] for one in document["engines"]] == ["fp32"]
    assert document["bench"]["openvino-cpu"]["unsteady"] == "busy"
    shown = succeed(*asked)
    assert "too unsteady to compare: busy" in shown
    assert "may be faster" not in shown


def test_package_writes_beside_the_bundle_and_says_what_is_next(copied_bundle: Path) -> None:
    said = succeed("package", copied_bundle, "--for", "triton")

    assert f"tritonserver --model-repository {copied_bundle}-triton" in unwrapped(said)
    assert re.search(r"^  fashion/config\.pbtxt \(.* KiB\)\n", said, flags=re.MULTILINE)
    assert (copied_bundle.with_name("bundle-triton") / "fashion" / "config.pbtxt").is_file()
    assert f"{copied_bundle}-triton" in fail("package", copied_bundle, "--for", "triton")


def test_run_with_check_finite_lets_a_picture_through(fashion_bundle: Path) -> None:
    picture = Path("examples/fashion_mnist/images/coat.png").absolute()

    for target in TARGETS:
        assert "Coat" in succeed("run", fashion_bundle, picture, "--device", target, "--check-finite")


def test_doctor_lists_the_targets_that_run_here() -> None:
    report = json.loads(succeed("doctor", "--json"))

    assert [target["target"] for target in report["targets"]] == list(TARGETS)
    assert {finding["what"] for finding in report["findings"]} >= {"CPU", "NVIDIA GPU", "target ort-cuda"}
