# SPDX-License-Identifier: Apache-2.0
"""What `quantize` refuses, before anything is written, and what is left of a run that is interrupted."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from perceiver_export.calibration import QuantizeOptions, quantize
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.calibration.quantization.statistics import Observer
from perceiver_export.runtimes import Bundle, files, open_bundle
from perceiver_export.runtimes.errors import BundleError, BundleExistsError, DataError, ExportError, UsageError
from tests.calibration.asked import quantizing
from tests.conftest import FASHION

HELD_OUT = FASHION / "held_out.npz"


@pytest.mark.parametrize(
    ("options", "datum"),
    [
        ({"scheme": "int2"}, "'int2'"),
        ({"scheme": "float"}, "'float'"),
        ({"method": "entropy"}, "'entropy'"),
        ({"samples": 0}, "samples is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"weight_bits": 5}, "weight_bits is 5"),
        ({"min_coverage": 120.0}, "min-coverage is 120"),
        ({"min_coverage": 0.97}, "97?"),
        ({"precision": {"*": "int3"}}, "'int3'"),
        ({"keep_float": "decoder.*"}, "'decoder.*'"),
    ],
)
def test_options_that_make_no_sense_cannot_be_made(options: dict[str, Any], datum: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantizeOptions(**options)
    assert datum in str(caught.value)


def _image(**changes: Any) -> list[dict[str, Any]]:
    return [{"image": np.zeros((3, 28, 28), np.float32), **changes}]


@pytest.mark.parametrize(
    ("options", "data", "error", "datum"),
    [
        ({"min_agreement": 0.97}, HELD_OUT, UsageError, "97?"),
        ({"keep_float": ["nonsense"]}, HELD_OUT, UsageError, "'nonsense'"),
        ({"keep_float": ["*"]}, HELD_OUT, UsageError, "all layers stay float"),
        ({"precision": {"*": "float"}}, HELD_OUT, UsageError, "all layers stay float"),
        ({}, "nowhere.npz", DataError, "nowhere.npz"),
        ({}, [], DataError, "no samples"),
        ({}, [{"picture": np.zeros((3, 28, 28), np.float32)}], DataError, "'picture'"),
        ({}, _image(image=np.zeros((3, 28, 27), np.float32)), DataError, "[3, 28, 27]"),
        ({}, _image(image=np.zeros((3, 28, 28), complex)), DataError, "complex128"),
        ({}, _image(image=np.full((3, 28, 28), np.nan, np.float32)), DataError, "NaN"),
        ({}, [[1, 2]], DataError, "list"),
    ],
)
def test_options_and_data_that_do_not_fit_the_bundle_are_refused(
    options: dict[str, Any], data: Any, error: type[Exception], datum: str, fashion_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        quantize(fashion_bundle, data, tmp_path / "out", quantizing(**options))
    assert datum in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bundles_that_cannot_be_quantized_are_refused(int8_bundle: Path, fashion_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already quantized"):
        quantize(int8_bundle, HELD_OUT, tmp_path / "twice")
    with pytest.raises(BundleExistsError):
        quantize(fashion_bundle, HELD_OUT, int8_bundle)
    with pytest.raises(BundleError, match="nothing"):
        quantize(tmp_path / "nothing", HELD_OUT, tmp_path / "out")
    shutil.copytree(int8_bundle, tmp_path / "damaged")
    (tmp_path / "damaged" / "calibration.json").write_text("{}")
    with pytest.raises(BundleError, match=r"calibration\.json"):
        read_calibration(Bundle(tmp_path / "damaged", open_bundle(int8_bundle).manifest))


@pytest.mark.parametrize(
    ("place", "name", "raised", "expected"),
    [
        (Observer, "run", KeyboardInterrupt(), KeyboardInterrupt),
        (files, "sync", OSError(errno.ENOSPC, "No space left on device"), ExportError),
    ],
)
def test_an_interrupted_run_and_a_full_disk_leave_nothing(
    place: object, name: str, raised: BaseException, expected: type[BaseException], fashion_bundle: Path, tmp_path: Path
) -> None:
    with mock.patch.object(place, name, side_effect=raised), pytest.raises(expected):
        quantize(fashion_bundle, HELD_OUT, tmp_path / "out", QuantizeOptions(samples=4))
    assert list(tmp_path.iterdir()) == []
