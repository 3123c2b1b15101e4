# SPDX-License-Identifier: Apache-2.0
"""Files and directories whose names are not UTF-8: they work, or are refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from perceiver_export.calibration import QuantizeOptions, quantize
from perceiver_export.exporter import export
from perceiver_export.exporter.describe import inspect_bundle
from perceiver_export.runtimes import build, load
from perceiver_export.runtimes.errors import BundleError
from tests.cli.commands import fail, succeed
from tests.conftest import FASHION

BAG = FASHION / "images" / "bag.png"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A directory with a name in Latin-1."""
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.mkdir()
    return path


def test_onnxruntime_refuses_a_bundle_in_one_line(fashion_bundle: Path, foreign: Path) -> None:
    bundle = Path(shutil.copytree(fashion_bundle, foreign / "bundle"))
    for call in (
        lambda: load(bundle, "ort-cpu"),
        lambda: build(bundle, "ort-cpu"),
        lambda: export(FASHION / "checkpoint", foreign / "new"),
        lambda: quantize(bundle, FASHION / "held_out.npz", foreign / "new", QuantizeOptions(samples=8)),
        lambda: inspect_bundle(bundle / "model.onnx"),
    ):
        with pytest.raises(BundleError) as raised:
            call()
        assert raised.value.hint == "rename the directory"
    fail("run", bundle, BAG, "--device", "ort-cpu")

    assert sorted(path.name for path in foreign.iterdir()) == ["bundle"]


def test_openvino_runs_it_and_json_is_utf8(fashion_bundle: Path, foreign: Path) -> None:
    bundle = Path(shutil.copytree(fashion_bundle, foreign / "bundle"))
    picture = foreign / os.fsdecode(b"\xe9.png")
    shutil.copy(BAG, picture)
    build(bundle, "openvino-cpu")

    assert "Bag" in json.dumps(json.loads(succeed("run", bundle, picture, "--device", "openvino-cpu", "--json")))


@pytest.mark.usefixtures("one_process")
def test_documents_take_any_name(fashion_bundle: Path, foreign: Path) -> None:
    """Names in formulas' signs, and in bytes that are not UTF-8, of the bundle, of its data and of what is written."""
    bundle = Path(shutil.copytree(fashion_bundle, foreign / "$x_{1} \\frac{ bundle"))
    (foreign / "data" / "Bag").mkdir(parents=True)
    for name in (b"\xe9.png", b"$_{.png", b"\x1b[31m.png", "\ufffe.png".encode()):
        shutil.copy(BAG, foreign / "data" / "Bag" / os.fsdecode(name))
    page, worst, cases = (foreign / os.fsdecode(b"\xe9" + end) for end in (b".html", b"worst", b".xml"))

    given = ("--data", foreign / "data", "--against", fashion_bundle, "--device", "openvino-cpu", "--json")
    found = succeed("validate", bundle, *given, "--report", page, "--save-worst", worst, "--junit", cases)

    assert len(json.loads(found)["worst_samples"]) == len(json.loads((worst / "worst.json").read_bytes())) == 4
    assert not any(character in page.read_text(encoding="utf-8") for character in "\ufffe\x1b")
    ElementTree.parse(cases)
