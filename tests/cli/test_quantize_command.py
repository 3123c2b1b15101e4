# SPDX-License-Identifier: Apache-2.0
"""`quantize` as it is typed, and `inspect` of what it made."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from perceiver_export.calibration.record import read_calibration
from perceiver_export.runtimes import open_bundle
from tests.conftest import FASHION

from .commands import fail, succeed

HELD_OUT = str(FASHION / "held_out.npz")


@pytest.fixture(scope="module")
def int8(plain_fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "with a space"
    folder.mkdir()
    out, plot = folder / "int8", folder / "layers.json"
    arguments = ["--data", HELD_OUT, "-o", str(out), "--samples", "16", "--sensitivity", str(plot)]
    shown = succeed("quantize", plain_fashion_bundle, *arguments)
    assert "ort-cpu: int8 multiply-adds in integer kernels" in shown
    assert "warning: 16 samples to calibrate on" in shown
    assert "the worst first" in shown
    assert f"9 more are in {plot}" in shown
    assert shown.splitlines()[-1].startswith(f"next: perceiver-export validate {shlex.quote(str(out))} ")
    assert json.loads(plot.read_text())[0]["group"] == "encoder.cross_attentions.0.attention.key"
    return out


def test_inspect_shows_every_linear_with_its_kernel(int8: Path) -> None:
    text = succeed("inspect", int8)
    document = json.loads(succeed("inspect", int8, "--json"))

    assert "MatMulIntegerToFloat" in text
    assert "100.00% of int8 in" in text
    assert len(document["calibration"]["parts"]["model"]["linears"]) == 47
    assert document["manifest"]["quantization"]["integer_share"] == {"ort-cpu": 1.0, "openvino-cpu": 1.0}


def test_what_gates_found_is_shown_kept_and_all_that_fail_are_named(fashion_bundle: Path, tmp_path: Path) -> None:
    common: list[str | Path] = ["quantize", fashion_bundle, "--data", HELD_OUT, "--samples", "32", "-o"]
    shown = succeed(*common, tmp_path / "held", "--max-drop", "5", "--min-agreement", "90")
    kept = json.loads(succeed("inspect", tmp_path / "held", "--json"))["calibration"]["gates"]
    said = fail(*common, tmp_path / "not", "--max-drop", "0.01", "--min-agreement", "99.99")

    for option in ("--max-drop 5", "--min-agreement 90"):
        assert any(line.startswith(f"held: {option}") for line in shown.splitlines())
    assert shown.count("; but 32 of 2,000 samples") == 2
    assert [gate["outcome"] for gate in kept] == ["held", "held"]
    assert "on the calibration data, held: --max-drop 5" in succeed("inspect", tmp_path / "held")
    assert open_bundle(tmp_path / "held", "always").manifest.name == "held"
    assert all(option in said for option in ("--max-drop 0.01", "--min-agreement 99.99", "nothing was written"))
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--data", HELD_OUT, "--scheme", "int3"], "there is no scheme 'int3'"),
        (["--data", "nowhere", "--samples", "3"], "nowhere does not exist"),
        (["--data", HELD_OUT, "--precision", "decoder"], "--precision 'decoder' is not NAME=SCHEME"),
        (["--data", HELD_OUT, "--keep-float", "head"], "no layer is called 'head'"),
        (["--data", HELD_OUT, "--device", "ort-cpu"], "--device has no effect without a search"),
        (["--data", HELD_OUT, "--allow-overlap"], "--allow-overlap has no effect without a search"),
        (["--data", HELD_OUT, "--least-gain", "1"], "--least-gain has no effect without a search"),
        (["--data", HELD_OUT, "--certify", HELD_OUT], "a search needs two sets of samples"),
        (
            ["--data", HELD_OUT, "--sensitivity", "layers.txt"],
            "layers.txt is no file that sensitivities are written to",
        ),
    ],
)
def test_errors_are_one_line_and_a_hint(arguments: list[str], error: str, fashion_bundle: Path, tmp_path: Path) -> None:
    assert error in fail("quantize", fashion_bundle, "-o", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_every_option_of_quantize_takes_effect_in_a_search(fashion_bundle: Path, tmp_path: Path) -> None:
    with np.load(FASHION / "test.npz") as data:
        for name, start, stop in (("search", 0, 200), ("certify", 200, 400)):
            np.savez(tmp_path / f"{name}.npz", image=data["image"][start:stop], labels=data["labels"][start:stop])
    kept, weights = "encoder.cross_attentions.*", "decoder.plain.logits.tail.mlp.hidden"
    wishes = ["--method", "minmax", "--samples", "24", "--weight-bits", "7", "--no-smooth", "--no-correct-bias"]
    wishes += ["--keep-float", kept, "--precision", f"{weights}=int4-weights", "--threads", "1", "--device", "all"]
    wishes += ["--max-metric-change", "0.5", "--metric", "kl", "--min-agreement", "80", "--least-gain", "1"]
    splits: list[str | Path] = ["--search", tmp_path / "search.npz", "--certify", tmp_path / "certify.npz"]
    arguments: list[str | Path] = [
        "--data",
        HELD_OUT,
        "-o",
        tmp_path / "mixed",
        "--sensitivity",
        tmp_path / "layers.json",
        *wishes,
    ]

    found = json.loads(succeed("quantize", fashion_bundle, *arguments, *splits, "--json"))

    kept_rung = found["rungs"][found["kept"]]
    assert [time["target"] for time in kept_rung["times"]] == ["ort-cpu", "openvino-cpu"]
    assert len(kept_rung["certification"]) == 4  # two gates on two targets
    assert {one["target"] for one in found["certificates"]} == {"ort-cpu", "openvino-cpu"}
    ranking = json.loads((tmp_path / "layers.json").read_text())
    assert ranking == found["ranking"]
    assert next(one["scheme"] for one in ranking if one["group"] == weights) == "int4-weights"
    calibration = read_calibration(open_bundle(tmp_path / "mixed"))
    assert calibration is not None
    assert (calibration.method, calibration.weight_bits, calibration.data.samples) == ("minmax", 7, 24)
    assert not calibration.smooth
    assert not calibration.correct_bias
    schemes = {one.group: one.scheme for one in calibration.parts["model"].linears}
    floats = {name for name in schemes if name.startswith("encoder.cross_attentions.")}
    assert floats
    assert all(schemes[name] == "float" for name in floats)
    assert floats.isdisjoint(one["group"] for one in ranking)
    if weights not in kept_rung["precision"]:
        assert schemes[weights] == "int4-weights"
