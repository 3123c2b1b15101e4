# SPDX-License-Identifier: Apache-2.0
"""Arguments of the wrong type are one error of this package's, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perceiver_export.calibration import Gates, QuantizeOptions, quantize, search, validate
from perceiver_export.exporter import ExportOptions, export, package
from tests.calibration.asked import HELD_OUT, asked, quantizing
from tests.conftest import FASHION
from tests.runtimes.test_arguments import wrong, wrong_by_name


def test_of_export(tmp_path: Path) -> None:
    given: dict[str, Any] = {"source": FASHION / "checkpoint", "output": tmp_path / "out"}
    wrong_by_name(export, "source", **given)
    wrong_by_name(export, "output", str, **given)
    wrong(lambda value: export(**given, options=ExportOptions(parity=value)))
    wrong(lambda value: export(**given, options=ExportOptions(memory_budget=value)), int, float, str)
    assert not any(tmp_path.iterdir())


def test_of_quantize(fashion_bundle: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"bundle": fashion_bundle, "data": HELD_OUT, "output": tmp_path / "out"}
    wrong_by_name(quantize, "bundle data options", **given)
    wrong_by_name(quantize, "output", str, **given)
    wrong_by_name(QuantizeOptions, "scheme method samples weight_bits threads precision")
    wrong_by_name(QuantizeOptions, "keep_float", list)
    wrong_by_name(QuantizeOptions, "min_coverage", float)
    wrong_by_name(Gates, "max_drop min_agreement", float)
    assert not any(tmp_path.iterdir())


def test_of_validate(fashion_bundle: Path) -> None:
    given: dict[str, Any] = {"bundle": fashion_bundle, "data": HELD_OUT}
    wrong_by_name(validate, "bundle data options", **given)
    names = "samples against against_device device threads precision metric gates"
    wrong_by_name(lambda **options: validate(**given, options=asked(**options)), names, samples=1)


def test_of_search_and_package(fashion_bundle: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"bundle": fashion_bundle, "calibrate": HELD_OUT, "search_on": HELD_OUT}
    given |= {"certify_on": HELD_OUT, "output": tmp_path / "out", "options": quantizing(min_agreement=90)}
    wrong_by_name(search, "bundle calibrate device least_gain options", **given)
    wrong_by_name(package, "bundle server target", bundle=fashion_bundle, out=tmp_path / "out", server="triton")
    assert not any(tmp_path.iterdir())
