# SPDX-License-Identifier: Apache-2.0
"""`run` on frames and sound: what it writes, and what it refuses before the model runs."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from perceiver_export.exporter.cli.answers import Request
from perceiver_export.exporter.cli.output import quiet
from perceiver_export.exporter.cli.run import run_task
from perceiver_export.runtimes.errors import InputError, UsageError
from perceiver_export.runtimes.preprocessing import VideoPreprocessing
from perceiver_export.runtimes.tasks.sound import read_wav, wav_rate, write_wav
from tests.runtimes.numpy_engine import NumpyEngine
from tests.runtimes.video_models import FRAMES, RATE, SAMPLES, SOUND, T, task_of, whole, write_frames


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> NumpyEngine:
    described, engine = whole()
    monkeypatch.setattr("perceiver_export.runtimes.tasks.open_task", lambda *_: task_of(described, engine))
    return engine


def run_video(inputs: list[str], output: Path | None = None, top: int = 2, json: bool = False) -> None:
    with quiet(json=json):
        run_task("video-autoencoding", Request("bundle", inputs, output, top))


def test_run_writes_frames_and_sound(opened: NumpyEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames, out = write_frames(tmp_path / "frames"), tmp_path / "out"
    write_wav(tmp_path / "a.wav", SOUND, RATE)
    run_video([str(frames), str(tmp_path / "a.wav")], out)

    shown = capsys.readouterr().out
    assert "the first 3 of 5 frames (f8.png to f10.png)" in shown
    assert "dB" in shown
    video = np.clip(opened.calls[0]["frames"][0] * 2 - 0.5, 0, 1)
    written = [np.asarray(Image.open(file)) for file in sorted(out.glob("frame_*.png"))]
    np.testing.assert_array_equal(np.stack(written), np.round(video * 255))
    assert sorted(file.name for file in out.iterdir()) == [*(f"frame_000{n}.png" for n in range(T)), "sound.wav"]
    np.testing.assert_allclose(read_wav(out / "sound.wav", RATE), np.clip(SOUND[:SAMPLES] * 3, -1, 1), atol=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.wav", "frames", "out"]


@pytest.mark.parametrize("with_sound", [True, False])
def test_where_no_rate_is_known_the_files_own_is_kept_and_none_is_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_sound: bool
) -> None:
    described, engine = whole()
    assert isinstance(described.preprocessing, VideoPreprocessing)
    steps = msgspec.structs.replace(described.preprocessing, sample_rate=None)
    described = msgspec.structs.replace(described, preprocessing=steps)
    monkeypatch.setattr("perceiver_export.runtimes.tasks.open_task", lambda *_: task_of(described, engine))
    frames, out, sound = write_frames(tmp_path / "frames"), tmp_path / "out", tmp_path / "a.wav"
    write_wav(sound, SOUND, 11_025)

    run_video([str(frames), str(sound)] if with_sound else [str(frames)], out)

    assert (out / "sound.wav").exists() == with_sound
    if with_sound:
        assert wav_rate(out / "sound.wav") == 11_025
        np.testing.assert_array_equal(engine.calls[0]["audio"][0, :, 0], read_wav(sound, None)[:SAMPLES])


def test_run_prints_json(opened: NumpyEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    np.save(tmp_path / "frames.npy", FRAMES[:T])
    run_video([str(tmp_path / "frames.npy")], top=1, json=True)

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
        with pytest.raises((InputError, UsageError)):
            run_video([str(full)], output)
    for inputs, file in (([str(full)] * 3, None), ([str(full)], tmp_path / "out.mp4")):
        with pytest.raises(UsageError):
            run_video(inputs, file)
    with pytest.raises(UsageError):
        run_video([str(full)], top=0)

    assert not opened.calls
