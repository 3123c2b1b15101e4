# SPDX-License-Identifier: Apache-2.0
"""The trained byte-level language model in int8, judged by what it fills in: a second metric beside pictures' top-1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perceiver_export.calibration import QuantizeOptions, quantize
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.runtimes import open_task
from tests.calibration.asked import judged, value

TEXT = Path(__file__).resolve().parents[2] / "examples" / "text_bytes"


def test_it_fills_bytes_that_their_neighbours_tell(text_bundle: Path) -> None:
    with open_task(text_bundle) as fill:
        filled = fill("And the LORD sp[MASK]ke unto M[MASK]ses, saying, Speak u[MASK]to the")
    assert filled.text == "And the LORD spake unto Moses, saying, Speak unto the"


def test_int8_fills_as_many_bytes_rightly(text_bundle: Path, tmp_path: Path) -> None:
    int8 = quantize(text_bundle, TEXT / "calibration.jsonl", tmp_path / "int8", QuantizeOptions(samples=64))
    for target in ("ort-cpu", "openvino-cpu"):
        given: dict[str, Any] = {"against": text_bundle, "device": target, "against_device": "ort-cpu"}
        result = judged(int8, TEXT / "test.jsonl", **given, samples=400)
        accuracy: Any = result.metric("token accuracy")
        assert accuracy.reference.value > 60  # the commonest byte, a space, is one of five
        assert accuracy.worsening.value < 0.5
        assert value(result, "kl") < 0.01
        assert value(result, "agreement") > 97
    calibration = read_calibration(int8)

    assert calibration is not None
    assert calibration.data.warnings == ()
    assert int8.manifest.quantization is not None
    assert int8.manifest.quantization.integer_share == {"ort-cpu": 1.0, "openvino-cpu": 1.0}
