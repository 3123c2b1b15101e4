# SPDX-License-Identifier: Apache-2.0
"""Audio classification: sound, spectrograms and frames into the graph, independent probabilities out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes.errors import BundleError, InputError, UsageError
from perceiver_export.runtimes.preprocessing import AudioPreprocessing, PointsPreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks.base import sigmoid
from perceiver_export.runtimes.tasks.images import prepare_frames
from perceiver_export.runtimes.tasks.sound import AudioClassification, log_mel, write_wav
from tests.runtimes.conftest import Ask
from tests.runtimes.models import NumpyEngine, manifest, opened, spec

RATE, SAMPLES, MEL, T, H, W = 8000, 1600, (10, 6), 2, 4, 4
SOUND = (np.random.default_rng(0).normal(size=SAMPLES + 100) * 0.1 + 0.2).astype(np.float32)
FRAMES = np.random.default_rng(1).integers(0, 256, (T + 1, 6, 5, 3), dtype=np.uint8)
LABELS = ("speech", "music", "dog", "rain")

HEARS = AudioPreprocessing(SAMPLES, RATE)
HEARS_MEL = AudioPreprocessing(SAMPLES, RATE, mel=MEL)
GIVEN_MEL = AudioPreprocessing(0, RATE, mel=MEL)
SEES = AudioPreprocessing(0, RATE, T, H, W)
BOTH = AudioPreprocessing(SAMPLES, RATE, T, H, W)


def means(names: Sequence[str], feeds: Feeds) -> dict[str, Array]:
    """Scores: the mean of each input in a label of its own, then 1 and −200."""
    batch = len(feeds[names[0]])
    found = [feeds[name].reshape(batch, -1).mean(axis=1) for name in names]
    rest = [np.full(batch, value, np.float32) for value in (1, -200, 0)]
    return {"logits": np.stack([*found, *rest], axis=1)[:, :4].astype(np.float32)}


def task_of(
    steps: Any, batch: int = 1, labels: Sequence[str] = LABELS, inputs: Any = None, outputs: Any = None
) -> tuple[AudioClassification, NumpyEngine]:
    if inputs is None:
        sound = spec("mel", batch, *MEL, 1) if getattr(steps, "mel", None) else spec("audio", batch, SAMPLES, 1)
        hears = isinstance(steps, AudioPreprocessing) and (steps.mel or steps.num_samples)
        sees = isinstance(steps, AudioPreprocessing) and steps.num_frames
        inputs = (*(sound,) * bool(hears), *(spec("frames", batch, T, H, W, 3),) * bool(sees))
    names = [one.name for one in inputs]
    engine = NumpyEngine(lambda feeds: means(names, feeds), inputs, outputs or (spec("logits", batch, 4),))
    described = manifest("audio-classification", engine, steps, labels=tuple(labels))
    return opened(AudioClassification, described, engine), engine


def test_sound_goes_in_and_each_label_has_its_own_probability(tmp_path: Path) -> None:
    sound = np.round(SOUND * 32768) / np.float32(32768)
    write_wav(tmp_path / "a.wav", sound, RATE)
    task, engine = task_of(HEARS)
    found = task(tmp_path / "a.wav", top=3)

    assert task(sound, top=3) == found
    np.testing.assert_array_equal(engine.calls[0]["audio"], sound[None, :SAMPLES, None])
    mean = float(sound[:SAMPLES].mean())
    assert [(one.label, one.index) for one in found] == [("music", 1), ("speech", 0), ("rain", 3)]
    assert [one.probability for one in found] == pytest.approx(
        [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-mean)), 0.5], abs=1e-6
    )
    assert sum(one.probability for one in found) > 1.5
    without_names, _ = task_of(HEARS, labels=())
    assert [one.label for one in without_names(sound, top=2)] == ["1", "0"]


@pytest.mark.parametrize("steps", [HEARS_MEL, GIVEN_MEL])
def test_a_spectrogram_can_be_given_as_it_is_and_sound_becomes_one(steps: AudioPreprocessing, tmp_path: Path) -> None:
    mel = np.random.default_rng(2).normal(size=MEL)
    np.save(tmp_path / "mel.npy", mel)
    task, engine = task_of(steps)
    for given in (mel, mel[..., None], tmp_path / "mel.npy", str(tmp_path / "mel.npy")):
        task(given)

    for call in engine.calls:
        np.testing.assert_array_equal(call["mel"], mel[None, ..., None].astype(np.float32))
    if steps is HEARS_MEL:
        task(SOUND)
        np.testing.assert_array_equal(engine.calls[-1]["mel"][0, :, :, 0], log_mel(SOUND[:SAMPLES], RATE, *MEL))


@pytest.mark.parametrize("steps", [SEES, BOTH])
def test_frames_alone_and_with_sound(steps: AudioPreprocessing) -> None:
    task, engine = task_of(steps)
    assert (task.hears, task.sees) == (steps is BOTH, True)
    task(SOUND if task.hears else None, FRAMES)

    np.testing.assert_array_equal(engine.calls[0]["frames"], prepare_frames(list(FRAMES[:T]), H, W)[None])
    if task.hears:
        np.testing.assert_array_equal(engine.calls[0]["audio"][0, :, 0], SOUND[:SAMPLES])


def test_color_is_of_frames_and_changes_no_sound() -> None:
    task, _ = task_of(BOTH)
    blue = [np.ascontiguousarray(frame[..., ::-1]) for frame in FRAMES]
    found, expected = task.preprocess(SOUND, blue, "bgr"), task.preprocess(SOUND, FRAMES)
    alone = task_of(HEARS)[0].preprocess(SOUND, color="bgr")

    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    np.testing.assert_array_equal(alone["audio"], expected["audio"])


def test_the_batch_of_the_bundle_is_filled_up() -> None:
    (task, engine), (alone, _) = task_of(HEARS, batch=2), task_of(HEARS)
    samples = [task.preprocess(SOUND[at:])["audio"] for at in range(3)]
    logits = task.run_inputs({"audio": np.concatenate(samples)})

    np.testing.assert_array_equal(logits, np.concatenate([alone.run_inputs({"audio": one}) for one in samples]))
    assert logits.shape == (3, 4)
    assert len(engine.calls) == 2


@pytest.mark.parametrize(
    ("steps", "audio", "frames", "message"),
    [
        (HEARS, None, None, "needs sound"),
        (HEARS, SOUND, FRAMES, "no frames"),
        (SEES, SOUND, FRAMES, "no sound"),
        (BOTH, SOUND, None, "needs frames"),
        (BOTH, SOUND, FRAMES[:1], "but got 1"),
        (HEARS, SOUND[:100], None, "100 samples"),
        (HEARS, "nowhere.wav", None, "does not exist"),
        (HEARS, SOUND * np.nan, None, "NaN or infinity"),
        (GIVEN_MEL, SOUND, None, r"shape \[1700\]"),
        (GIVEN_MEL, "sound.wav", None, "sound file"),
        (GIVEN_MEL, np.zeros((6, 10), np.float32), None, r"shape \[6, 10\]"),
        (HEARS_MEL, np.zeros(MEL, np.int32), None, "int32"),
        (HEARS_MEL, np.full(MEL, np.inf), None, "NaN or infinity"),
        (HEARS_MEL, "nowhere.npy", None, "does not exist"),
    ],
)
def test_what_the_model_does_not_take_is_refused(
    steps: AudioPreprocessing, audio: Any, frames: Any, message: str
) -> None:
    task, engine = task_of(steps)
    with pytest.raises(InputError, match=message):
        task(audio, frames)
    assert not engine.calls


def test_a_spectrogram_file_of_another_shape_and_no_label_at_all_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "mel.npy", np.zeros((MEL[0] + 1, MEL[1]), np.float32))
    with pytest.raises(InputError, match=r"\[11, 6\]"):
        task_of(HEARS_MEL)[0](tmp_path / "mel.npy")
    with pytest.raises(UsageError):
        task_of(HEARS)[0](SOUND, top=0)


def test_sound_and_frames_may_be_lists() -> None:
    task, _ = task_of(BOTH)
    assert task(SOUND.tolist(), list(FRAMES)) == task(SOUND, FRAMES)
    wrong: list[tuple[Any, Any]] = [(SOUND.tolist(), 3), ([[0.0], [0.0, 1.0]], FRAMES), (["loud"], FRAMES)]
    for audio, frames in wrong:
        with pytest.raises(InputError):
            task(audio, frames)


@pytest.mark.parametrize(
    ("steps", "changes"),
    [
        (None, {}),
        (PointsPreprocessing(4), {}),
        (AudioPreprocessing(0, RATE), {}),
        (HEARS, {"labels": ("one",)}),
        (HEARS, {"inputs": (spec("audio", 1, SAMPLES + 1, 1),)}),
        (HEARS, {"inputs": (spec("sound", 1, SAMPLES, 1),)}),
        (HEARS, {"outputs": (spec("one", 1, 4), spec("other", 1, 4))}),
        (HEARS, {"outputs": (spec("logits", 1, 4, 2),)}),
    ],
)
def test_manifests_that_do_not_fit_are_refused(steps: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        task_of(steps, **changes)


def test_the_sigmoid_does_not_overflow() -> None:
    with np.errstate(all="raise", under="ignore"):
        found = sigmoid(np.array([-3e38, -1, 0, 1, 3e38], np.float32))

    assert found.tolist() == pytest.approx([0, 0.26894143, 0.5, 0.73105857, 1], abs=1e-7)


def test_run_takes_many_recordings(ask: Ask, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.wav", "b.wav")]
    for file in files:
        write_wav(file, SOUND, RATE)
    shown = ask(task_of(HEARS)[0], *files, output=tmp_path / "out.json", top=1)

    assert shown.count("music  73.1%") == 2
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [answer["input"] for answer in written["answers"]] == files
    assert written["answers"][0]["labels"][0]["label"] == "music"


def test_run_takes_recordings_and_frames_in_pairs(ask: Ask, tmp_path: Path) -> None:
    wav, frames, other = (str(tmp_path / name) for name in ("a.wav", "frames.npy", "other.npy"))
    write_wav(wav, SOUND, RATE)
    np.save(frames, FRAMES)
    np.save(other, FRAMES[::-1])
    answers = ask(task_of(BOTH)[0], wav, frames, wav, other, as_json=True)["answers"]

    assert [answer["input"] for answer in answers] == [f"{wav} + {frames}", f"{wav} + {other}"]
    with pytest.raises(UsageError, match="in pairs"):
        ask(task_of(BOTH)[0], wav)
