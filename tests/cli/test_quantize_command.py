# SPDX-License-Identifier: Apache-2.0
"""`quantize` as it is typed, and `inspect` of what it made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import FASHION

from .commands import fail, succeed

HELD_OUT = str(FASHION / "held_out.npz")


@pytest.fixture(scope="module")
def int8(plain_fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    out, plot = folder / "int8", folder / "layers.json"
    arguments = ["--data", HELD_OUT, "-o", str(out), "--samples", "16", "--sensitivity", str(plot)]
    shown = succeed("quantize", plain_fashion_bundle, *arguments)
    assert "ort-cpu: multiply-adds in integer kernels" in shown
    assert "warning: 16 samples to calibrate on" in shown
    assert "the worst first" in shown
    assert json.loads(plot.read_text())[0]["group"] == "encoder.cross_attentions.0.attention.key"
    return out


def test_inspect_shows_every_linear_with_its_kernel(int8: Path) -> None:
    text = succeed("inspect", int8)
    document = json.loads(succeed("inspect", int8, "--json"))

    assert "MatMulIntegerToFloat" in text
    assert "100.00% integer" in text
    assert len(document["calibration"]["parts"]["model"]["linears"]) == 47
    assert document["manifest"]["quantization"]["integer_share"] == {"ort-cpu": 1.0, "openvino-cpu": 1.0}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--data", HELD_OUT, "--scheme", "int3"], "there is no scheme 'int3'"),
        (["--data", "nowhere", "--samples", "3"], "nowhere does not exist"),
        (["--data", HELD_OUT, "--precision", "decoder"], "--precision 'decoder' is not NAME=SCHEME"),
        (["--data", HELD_OUT, "--keep-float", "head"], "no layer is called 'head'"),
        (
            ["--data", HELD_OUT, "--sensitivity", "layers.txt"],
            "layers.txt is no file that sensitivities are written to",
        ),
    ],
)
def test_errors_are_one_line_and_a_hint(arguments: list[str], error: str, fashion_bundle: Path, tmp_path: Path) -> None:
    assert error in fail("quantize", fashion_bundle, "-o", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []
