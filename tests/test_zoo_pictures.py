# SPDX-License-Identifier: Apache-2.0
"""The trained examples flow and video: their shipped checkpoints do what their READMEs say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceiver_export.calibration import validate
from perceiver_export.exporter import export
from perceiver_export.runtimes import open_task
from tests.cli.commands import perceiver_export
from tests.conftest import REPOSITORY, MadeOnce

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def flow_bundle(made_once: MadeOnce) -> Path:
    return made_once("zoo-flow", lambda path: export(EXAMPLES / "flow" / "checkpoint", path))


@pytest.fixture
def video_bundle(made_once: MadeOnce) -> Path:
    return made_once("zoo-video", lambda path: export(EXAMPLES / "video" / "checkpoint", path))


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


def test_video_is_as_good_as_the_readme_says(video_bundle: Path) -> None:
    result = validate(video_bundle, EXAMPLES / "video" / "test.npz")

    found = {one.name: one.candidate.value for one in result.metrics}
    assert found["psnr"] == pytest.approx(said("video", "PSNR of the frames, Perceiver, fp32"), abs=0.02)
    assert found["sound snr"] == pytest.approx(said("video", "SNR of the sound, Perceiver, fp32"), abs=0.02)


def test_video_names_the_clip(video_bundle: Path) -> None:
    with np.load(EXAMPLES / "video" / "test.npz") as test, open_task(video_bundle) as task:
        feeds = {name: test[name].astype(np.float32) for name in ("frames", "audio")}
        right = task.decode("label", task.encode(feeds)).argmax(-1) == test["label"]

    assert right.sum() == said("video", "labels that are right, of 36, Perceiver, fp32")


def test_the_rabbit_is_reconstructed_as_frames_and_sound(video_bundle: Path, tmp_path: Path) -> None:
    rabbit = EXAMPLES / "video" / "rabbit"

    result = perceiver_export("run", video_bundle, rabbit, f"{rabbit}.wav", "-o", tmp_path / "rabbit")

    assert result.returncode == 0, result.stderr
    found = sorted((tmp_path / "rabbit").glob("*.png"))
    errors = [
        (np.asarray(Image.open(one), float) - np.asarray(Image.open(given), float)).std()
        for one, given in zip(found, sorted(rabbit.iterdir()), strict=True)
    ]
    assert max(errors) < 40
    assert (tmp_path / "rabbit" / "sound.wav").stat().st_size == 44 + 2 * 1280
