# SPDX-License-Identifier: Apache-2.0
"""The trained example flow: the shipped checkpoint does what its README says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceiver_export.calibration import validate
from perceiver_export.exporter import export
from tests.cli.commands import perceiver_export
from tests.conftest import REPOSITORY, MadeOnce

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def flow_bundle(made_once: MadeOnce) -> Path:
    return made_once("zoo-flow", lambda path: export(EXAMPLES / "flow" / "checkpoint", path))


def said(name: str, what: str) -> float:
    """The figure beside ``what`` in the README's table."""
    text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {re.escape(what)} \| ([\d.]+)", text, re.MULTILINE)
    return float(row)


def test_flow_is_as_good_as_the_readme_says(flow_bundle: Path) -> None:
    found = {one.name: one for one in validate(flow_bundle, EXAMPLES / "flow" / "test.npz").metrics}

    assert found["epe"].candidate.value == pytest.approx(said("flow", "Perceiver, fp32"), abs=0.002)


def test_flow_of_the_real_frames_is_written_as_a_picture(flow_bundle: Path, tmp_path: Path) -> None:
    frames = sorted((EXAMPLES / "flow" / "frames").iterdir())

    result = perceiver_export("run", flow_bundle, *frames, "-o", tmp_path / "flow.png")

    assert result.returncode == 0, result.stderr
    with Image.open(frames[0]) as frame, Image.open(tmp_path / "flow.png") as picture:
        assert picture.size == frame.size
        assert np.ptp(np.asarray(picture)) > 100  # something moves
