# SPDX-License-Identifier: Apache-2.0
"""What `quantize` refuses, before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import quantize
from perceiver_export.calibration.record import read_calibration
from perceiver_export.runtimes import Bundle, open_bundle
from perceiver_export.runtimes.errors import BundleError, BundleExistsError, DataError, UsageError
from tests.conftest import FASHION

HELD_OUT = FASHION / "held_out.npz"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scheme": "int2"}, UsageError, "no scheme 'int2'"),
        ({"scheme": "float"}, UsageError, "nothing to quantize"),
        ({"method": "magic"}, UsageError, "no method 'magic'"),
        ({"samples": 0}, UsageError, "samples is 0"),
        ({"weight_bits": 5}, UsageError, "weights of 5 bits"),
        ({"min_coverage": 120.0}, UsageError, "min-coverage is 120"),
        ({"precision": {"*": "int3"}}, UsageError, "no scheme 'int3'"),
        ({"data": "nowhere.npz"}, DataError, "nowhere.npz does not exist"),
        ({"data": []}, DataError, "no samples"),
        ({"data": [{"picture": np.zeros((3, 28, 28), np.float32)}]}, DataError, "'picture', which the model does not"),
        (
            {"data": [{"image": np.zeros((3, 28, 27), np.float32)}]},
            DataError,
            r"float32 \[3, 28, 27\], the model takes",
        ),
        ({"data": [{"image": np.zeros((3, 28, 28), complex)}]}, DataError, "complex128"),
        ({"data": [{"image": np.full((3, 28, 28), np.nan, np.float32)}]}, DataError, "NaN or infinite"),
        ({"data": [[1, 2]]}, DataError, "not a dict"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str, fashion_bundle: Path, tmp_path: Path
) -> None:
    data = arguments.pop("data", HELD_OUT)
    with pytest.raises(error, match=message):
        quantize(fashion_bundle, data, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_bundles_that_cannot_be_quantized_are_refused(int8_bundle: Path, fashion_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is quantized already"):
        quantize(int8_bundle, HELD_OUT, tmp_path / "twice")
    with pytest.raises(BundleExistsError):
        quantize(fashion_bundle, HELD_OUT, int8_bundle)
    with pytest.raises(BundleError, match="does not exist"):
        quantize(tmp_path / "nothing", HELD_OUT, tmp_path / "out")
    shutil.copytree(int8_bundle, tmp_path / "damaged")
    (tmp_path / "damaged" / "calibration.json").write_text("{}")
    with pytest.raises(BundleError, match=r"calibration\.json cannot be read"):
        read_calibration(Bundle(tmp_path / "damaged", open_bundle(int8_bundle).manifest))
