# SPDX-License-Identifier: Apache-2.0
"""`run` on frames and sound: what it writes, and what it refuses before the model runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.exporter.cli.run_video import run
from perceiver_export.runtimes.audio_files import read_wav, write_wav
from perceiver_export.runtimes.errors import InputError, UsageError
from tests.runtimes.numpy_engine import NumpyEngine
from tests.runtimes.video_models import (
    FRAMES,
    RATE,
    SAMPLES,
    SOUND,
    T,
    task_of,
    whole,
    write_frames,
)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> NumpyEngine:
    described, engine = whole()
    monkeypatch.setattr("perceiver_export.runtimes.tasks.open_task", lambda *_: task_of(described, engine))
    return engine


OPTIONS = RunOptions(top=2, device="auto", threads=None, json=False)


def test_run_writes_frames_and_sound(opened: NumpyEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames, out = write_frames(tmp_path / "frames"), tmp_path / "out"
    write_wav(tmp_path / "a.wav", SOUND, RATE)
    run("bundle", [str(frames), str(tmp_path / "a.wav")], out, OPTIONS)

    shown = capsys.readouterr().out
    assert "the first 3 of 5 frames (f8.png to f10.png)" in shown
    assert "dB" in shown
    video = np.clip(opened.calls[0]["frames"][0] * 2 - 0.5, 0, 1)
    written = [np.asarray(Image.open(file)) for file in sorted(out.glob("frame_*.png"))]
    np.testing.assert_array_equal(np.stack(written), np.round(video * 255))
    assert sorted(file.name for file in out.iterdir()) == [*(f"frame_000{n}.png" for n in range(T)), "sound.wav"]
    np.testing.assert_allclose(read_wav(out / "sound.wav", RATE), np.clip(SOUND[:SAMPLES] * 3, -1, 1), atol=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.wav", "frames", "out"]


def test_run_prints_json(opened: NumpyEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    np.save(tmp_path / "frames.npy", FRAMES[:T])
    run("bundle", [str(tmp_path / "frames.npy")], None, RunOptions(1, "auto", None, json=True))

    document = json.loads(capsys.readouterr().out)
    assert document["labels"][0]["index"] == 3
    assert document["frames"] == {"used": T, "there": T, "first": None, "last": None}
    assert list(document["psnr"]) == ["video"]
    video = opened.calls[0]["frames"]
    error = float(np.mean((video.astype(np.float64) - np.clip(video * 2 - 0.5, 0, 1)) ** 2))
    assert document["psnr"]["video"] == pytest.approx(-10 * math.log10(error), abs=1e-4)


def test_run_refuses_what_it_cannot_do_before_the_model_runs(opened: NumpyEngine, tmp_path: Path) -> None:
    full = write_frames(tmp_path / "frames")
    for output in (full, full / "f8.png", tmp_path / "no" / "out"):
        with pytest.raises(InputError):
            run("bundle", [str(full)], output, OPTIONS)
    for inputs, file in (([str(full)] * 3, None), ([str(full)], tmp_path / "out.mp4")):
        with pytest.raises(UsageError):
            run("bundle", inputs, file, OPTIONS)
    with pytest.raises(UsageError):
        run("bundle", [str(full)], None, RunOptions(0, "auto", None, json=False))

    assert not opened.calls
