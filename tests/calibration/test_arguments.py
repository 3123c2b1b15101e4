# SPDX-License-Identifier: Apache-2.0
"""Arguments of the wrong type are one error of this package's, before anything is written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from perceiver_export.calibration import QuantizeOptions, quantize, search, validate
from perceiver_export.exporter import ExportOptions, export, package
from tests.calibration.asked import asked, quantizing
from tests.conftest import FASHION
from tests.runtimes.test_arguments import wrong

HELD_OUT = FASHION / "held_out.npz"


def _options(call: Any, arguments: dict[str, Any], kind: Any, name: str, value: Any) -> object:
    return call(**arguments, options=kind(**{name: value}))


def _set(call: Any, arguments: dict[str, Any], name: str, value: Any) -> object:
    return call(**{**arguments, name: value})


def test_of_export(tmp_path: Path) -> None:
    given = {"source": FASHION / "checkpoint", "output": tmp_path / "out"}
    wrong(partial(_set, export, given, "source"))
    wrong(partial(_set, export, given, "output"), str)
    for name in ("parity", "memory_budget"):
        but = (int, float) if name == "memory_budget" else ()
        wrong(partial(_options, export, given, ExportOptions, name), *but)
    assert not any(tmp_path.iterdir())


def test_of_quantize(fashion_bundle: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"bundle": fashion_bundle, "data": HELD_OUT, "output": tmp_path / "out"}
    for name in ("bundle", "data", "options"):
        wrong(partial(_set, quantize, given, name))
    wrong(partial(_set, quantize, given, "output"), str)
    for name in ("scheme", "method", "samples", "weight_bits", "threads", "precision", "keep_float"):
        wrong(partial(_set, QuantizeOptions, {}, name), *((list,) if name == "keep_float" else ()))
    wrong(partial(_set, QuantizeOptions, {}, "min_coverage"), float)
    for name in ("max_drop", "min_agreement"):
        wrong(partial(_options, quantize, given, quantizing, name), float)
    assert not any(tmp_path.iterdir())


def test_of_validate(fashion_bundle: Path) -> None:
    given = {"bundle": fashion_bundle, "data": HELD_OUT}
    for name in ("bundle", "data", "options"):
        wrong(partial(_set, validate, given, name))
    for name in ("samples", "against", "against_device", "device", "threads", "precision", "metric", "gates"):
        wrong(partial(_options, validate, given, partial(asked, samples=1), name))


def test_of_search_and_package(fashion_bundle: Path, tmp_path: Path) -> None:
    places = {"bundle": fashion_bundle, "out": tmp_path / "out"}
    splits = {"calibrate": HELD_OUT, "search_on": HELD_OUT, "certify_on": HELD_OUT}
    given = {"bundle": fashion_bundle, "output": tmp_path / "out", "options": quantizing(min_agreement=90)}
    for name in ("bundle", "calibrate", "device", "least_gain", "options"):
        wrong(partial(_set, search, {**given, **splits}, name))
    for name in ("bundle", "server", "target"):
        wrong(partial(_set, package, {**places, "server": "triton"}, name))
    assert not any(tmp_path.iterdir())
