# SPDX-License-Identifier: Apache-2.0
"""`quantize` as it is typed, and `inspect` of its bundles."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from perceiver_export.calibration import Gates, QuantizeOptions
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.errors import GateError
from tests.calibration.asked import HELD_OUT, pictures

from .commands import fail, succeed


@pytest.fixture(scope="module")
def int8(plain_fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "with a space"
    folder.mkdir()
    out, file = folder / "int8", folder / "layers.json"
    arguments = ("--data", HELD_OUT, "-o", out, "--samples", "16", "--sensitivity", file)
    shown = succeed("quantize", plain_fashion_bundle, *arguments)
    assert "100.00%" in shown
    assert "warning: only 16 calibration samples" in shown
    said = " ".join(shown.replace(" \\\n", " ").split())
    assert f"perceiver-export profile {shlex.quote(str(out))} --sort loss" in said
    assert f"next: perceiver-export validate {shlex.quote(str(out))} " in said
    assert json.loads(file.read_text())[0]["group"] == "encoder.cross_attentions.0.attention.key"
    return out


def test_inspect_shows_how_much_of_int8_runs_in_integer_kernels(int8: Path) -> None:
    text = succeed("inspect", int8)
    document = json.loads(succeed("inspect", int8, "--json"))

    assert text.count("100.00% of int8 multiply-adds") == 2
    assert len(document["calibration"]["parts"]["model"]["linears"]) == 47
    assert document["manifest"]["quantization"]["integer_share"] == {"ort-cpu": 1.0, "openvino-cpu": 1.0}


def test_a_profile_is_a_table_a_csv_file_a_page_and_json(
    int8: Path, plain_fashion_bundle: Path, tmp_path: Path
) -> None:
    given: list[str | Path] = ["profile", int8, "--device", "ort-cpu"]
    shown = succeed(*given, "--sort", "loss", "-o", tmp_path / "layers.csv")
    page = tmp_path / "layers.html"
    document = json.loads(succeed(*given, "--against", plain_fashion_bundle, "-o", page, "--json"))
    with (tmp_path / "layers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    assert "MatMulIntegerToFloat" in shown
    assert "-o FILE.csv" in shown
    assert len(rows) == len(document["layers"]) == page.read_text(encoding="utf-8").count("<tr>") - 1
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert losses == sorted(losses)
    assert rows[0]["layer"] == "encoder.cross_attentions.0.attention.key"
    assert all(one["against"] is not None for one in document["layers"])
    for wrong in ("layers.txt", int8 / "layers.csv"):
        fail(*given, "-o", wrong)


@pytest.mark.usefixtures("untimed")
def test_what_gates_found_is_shown_kept_and_all_that_fail_are_named(fashion_bundle: Path, tmp_path: Path) -> None:
    few = pictures(tmp_path / "few.npz", slice(200), source=HELD_OUT)
    common: list[str | Path] = ["quantize", fashion_bundle, "--data", few, "--samples", "32", "-o"]
    shown = succeed(*common, tmp_path / "held", "--max-drop", "10", "--min-agreement", "85")
    kept = json.loads(succeed("inspect", tmp_path / "held", "--json"))["calibration"]["gates"]
    said = fail(*common, tmp_path / "not", "--max-drop", "0.01", "--min-agreement", "99.99")

    assert [gate["outcome"] for gate in kept] == ["held", "held"]
    assert shown.count("32 of 200 samples") == 2
    assert succeed("inspect", tmp_path / "held").count("on the calibration data") == 2
    assert open_bundle(tmp_path / "held", "always").manifest.name == "held"
    assert all(option in said for option in ("top-1 drop ≤ 0.01 points", "agreement ≥ 99.99 %", "nothing was written"))
    assert not (tmp_path / "not").exists()


def test_every_option_is_passed_on(fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}

    def take(bundle: str, *arguments: Any, **options: Any) -> None:
        taken["options"] = arguments[-1]
        taken.update(options)
        raise GateError("stopped", "that is all this test needs")

    typed = ["--scheme", "int8-weights", "--method", "minmax", "--samples", "24", "--weight-bits", "7", "--no-smooth"]
    typed += ["--no-correct-bias", "--keep-float", "a.*", "--precision", "b=int4-weights", "--min-coverage", "90"]
    typed += ["--max-drop", "1", "--min-agreement", "80", "--max-metric-change", "2%", "--metric", "kl"]
    typed += ["--truncate", "--overwrite", "--threads", "3"]
    given: dict[str, Any] = {"scheme": "int8-weights", "method": "minmax", "samples": 24, "weight_bits": 7}
    given |= {"smooth": False, "correct_bias": False, "keep_float": ["a.*"], "precision": {"b": "int4-weights"}}
    given |= {"min_coverage": 90, "gates": Gates(1, 80, "2%", "kl")}
    expected = QuantizeOptions(**given, truncate=True, overwrite=True, threads=3)
    for name, more in (
        ("quantize", []),
        ("search", ["--search", "s", "--certify", "c", "--device", "all", "--least-gain", "1", "--allow-overlap"]),
    ):
        monkeypatch.setattr(f"perceiver_export.calibration.{name}", take, raising=False)
        fail("quantize", fashion_bundle, "--data", HELD_OUT, "-o", tmp_path / "out", *typed, *more)
        assert taken.pop("options") == expected
    assert (taken.pop("sensitivity"), taken.pop("statistics")) == ((), ())
    taken.pop("progress")
    splits = {"calibrate": str(HELD_OUT), "search_on": "s", "certify_on": "c"}
    assert taken == {**splits, "device": "all", "least_gain": 1, "for_size": False, "allow_overlap": True}


@pytest.mark.usefixtures("one_process")
def test_a_search_is_shown_rung_by_rung(fashion_bundle: Path, tmp_path: Path) -> None:
    search = pictures(tmp_path / "search.npz", slice(200))
    certify = pictures(tmp_path / "certify.npz", slice(200, 400))
    weights = "decoder.cross_attention.mlp.hidden"
    given: list[str | Path] = ["--data", HELD_OUT, "-o", tmp_path / "mixed", "--samples", "24", "--device", "all"]
    given += ["--keep-float", "encoder.*", "--precision", f"{weights}=int4-weights", "--min-agreement", "80"]
    given += ["--max-metric-change", "0.5", "--metric", "kl", "--sensitivity", tmp_path / "layers.json"]
    shown = succeed("quantize", fashion_bundle, *given, "--search", search, "--certify", certify, "--for-size")
    ranking = json.loads((tmp_path / "layers.json").read_text())

    assert "no layer was raised" in shown
    assert shown.count("certified: ") == 2  # a certificate a target
    assert next(one["scheme"] for one in ranking if one["group"] == weights) == "int4-weights"
    assert not any(one["group"].startswith("encoder.") for one in ranking)
