# SPDX-License-Identifier: Apache-2.0
"""The trained byte-level language model in int8, judged by what it fills in: a second metric beside pictures' top-1."""

from __future__ import annotations

from pathlib import Path

import pytest

from perceiver_export.calibration import QuantizeOptions, quantize
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.exporter import export
from perceiver_export.runtimes import open_task
from tests.calibration.asked import judged

TEXT = Path(__file__).resolve().parents[2] / "examples" / "text_bytes"


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(TEXT / "checkpoint", tmp_path_factory.mktemp("text") / "text").path


def test_it_fills_bytes_that_their_neighbours_tell(fp32: Path) -> None:
    with open_task(fp32) as fill:
        filled = fill("And the LORD sp[MASK]ke unto M[MASK]ses, saying, Speak u[MASK]to the")
    assert filled.text == "And the LORD spake unto Moses, saying, Speak unto the"


@pytest.mark.parametrize("target", ["ort-cpu", "openvino-cpu"])
def test_int8_fills_as_many_bytes_rightly(fp32: Path, tmp_path: Path, target: str) -> None:
    int8 = quantize(fp32, TEXT / "calibration.jsonl", tmp_path / "int8", QuantizeOptions(samples=64))
    result = judged(int8, TEXT / "test.jsonl", against=fp32, device=target, against_device="ort-cpu", samples=400)
    accuracy, divergence, agreement = (result.metric(name) for name in ("token accuracy", "kl", "agreement"))
    calibration = read_calibration(int8)

    assert accuracy is not None
    assert accuracy.reference is not None
    assert accuracy.worsening is not None
    assert accuracy.reference.value > 60  # the commonest byte, a space, is one of five
    assert accuracy.worsening.value < 0.5
    assert divergence is not None
    assert divergence.candidate.value < 0.01
    assert agreement is not None
    assert agreement.candidate.value > 97
    assert calibration is not None
    assert calibration.data.warnings == ()
    assert int8.manifest.quantization is not None
    assert int8.manifest.quantization.integer_share == {"ort-cpu": 1.0, "openvino-cpu": 1.0}
