# SPDX-License-Identifier: Apache-2.0
"""Calibration data that looks right and is not: refused with the sample's name, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import quantize
from perceiver_export.calibration.quantization.statistics import Observer
from perceiver_export.runtimes.errors import DataError, UsageError
from tests.calibration.asked import quantizing
from tests.calibration.graphs import build, save
from tests.cli.commands import fail
from tests.conftest import FASHION


@pytest.mark.parametrize("token", [262, -5])
def test_tokens_that_the_model_does_not_know_are_refused(text_bundle: Path, tmp_path: Path, token: int) -> None:
    """Of a negative one the engine would take a row from the table's end, and say nothing."""
    data = tmp_path / "tokens.npz"
    np.savez(data, tokens=np.full((2, 64), token, np.int32), tokens_mask=np.ones((2, 64), np.int32))

    said = fail("quantize", text_bundle, "--data", data, "-o", tmp_path / "out")

    assert f"tokens.npz[0]: 'tokens' contains {token}" in said
    assert not (tmp_path / "out").exists()


def test_a_script_that_ends_the_program_ends_no_command(
    fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`validate` ended with 0, as if its gates held."""
    (tmp_path / "script.py").write_text("import sys\ndef samples(): yield {}\nsys.exit(0)\n")
    (tmp_path / "metric.py").write_text("import sys\ndef leaves(outputs, targets): sys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    command: list[str | Path] = ["validate", fashion_bundle, "--against", fashion_bundle, "--samples", "2"]

    said = fail(*command, "--data", "script:samples", "--max-drop", "1")
    assert "script:samples cannot be imported: SystemExit(0)" in said
    own = ["--metric", "metric:leaves", "--max-metric-change", "1"]
    assert "metric:leaves failed: SystemExit: 0" in fail(*command, "--data", FASHION / "test.npz", *own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 1.0, "data": [{}]}, "data that can be read twice"),
        ({"max_drop": 1.0, "data": "random"}, "random numbers"),
        ({"max_drop": -1.0}, "--max-drop is -1"),
        ({"metric": "kl"}, "--metric has no effect without --max-metric-change"),
        ({"metric": "nonsense", "max_metric_change": 0.1}, "no metric 'nonsense'"),
    ],
)
def test_gates_that_cannot_be_held_are_refused_before_anything_runs(
    options: dict[str, Any], message: str, fashion_bundle: Path, tmp_path: Path
) -> None:
    ran: list[str] = []
    data = options.pop("data", FASHION / "held_out.npz")
    with pytest.raises(UsageError, match=message):
        quantize(
            fashion_bundle, data, tmp_path / "out", quantizing(**options), progress=lambda what, *_: ran.append(what)
        )
    assert ran == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", [0, 3, 5])
def test_nan_in_one_row_of_a_tensor_is_found(row: int, tmp_path: Path) -> None:
    """onnxruntime's reductions pass over a NaN that is not in the first row, so bounds alone do not show it."""
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    one (float[1, 6, 16] x, float[16, 16] w) => (float[1, 6, 16] y) { l = Log (x)  y = MatMul (l, w) }
    """
    model = build(text)
    observer = Observer(save(model, tmp_path), 1)
    rows = np.ones((1, 6, 16), np.float32)
    rows[0, row, 2] = -1.0

    observer.run({"x": np.ones_like(rows)})
    with pytest.raises(DataError, match="NaN or infinity in y"):
        observer.run({"x": rows})
    assert np.isfinite(observer.statistics.activations["l"].largest).all()
