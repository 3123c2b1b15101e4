# SPDX-License-Identifier: Apache-2.0
"""Video autoencoding: what goes into the graphs, how their rows become a video, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from perceiver_export.runtimes.errors import BundleError, InputError, UsageError
from perceiver_export.runtimes.manifest import Part
from perceiver_export.runtimes.preprocessing import PointsPreprocessing, VideoPreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds, Runtime
from perceiver_export.runtimes.tasks.images import prepare_frames
from perceiver_export.runtimes.tasks.sound import read_wav, write_wav
from perceiver_export.runtimes.tasks.video import VideoAutoencoding, psnr
from tests.runtimes.models import spec
from tests.runtimes.numpy_engine import NumpyEngine
from tests.runtimes.video_models import (
    FRAMES,
    RATE,
    SAMPLES,
    SOUND,
    H,
    T,
    W,
    interface,
    manifest,
    split,
    task_of,
    whole,
    write_frames,
)
from tests.vector_folders import model_folders


def test_the_whole_model_gets_prepared_frames_and_sound_and_its_answer_is_clipped() -> None:
    described, engine = whole()
    with task_of(described, engine) as task:
        found = task.autoencode(FRAMES, SOUND, top=2)

    prepared = prepare_frames(list(FRAMES[:T]), H, W)
    np.testing.assert_array_equal(engine.calls[0]["frames"], prepared[None])
    np.testing.assert_array_equal(engine.calls[0]["audio"][0, :, 0], SOUND[:SAMPLES])
    np.testing.assert_array_equal(found.video, np.clip(prepared * 2 - 0.5, 0, 1))
    np.testing.assert_array_equal(found.sound, np.clip(SOUND[:SAMPLES] * 3, -1, 1))
    assert [(one.label, one.index) for one in found.labels] == [("3", 3), ("5", 5)]
    assert found.frames.dtype == np.uint8
    np.testing.assert_allclose(found.frames / 255, found.video, atol=0.5 / 255 + 1e-6)


def test_frames_are_pillow_images_and_arrays_of_either_order() -> None:
    described, engine = whole()
    with task_of(described, engine) as task:
        expected = task.preprocess(FRAMES, SOUND)["frames"]
        for frames in (FRAMES[..., ::-1], list(FRAMES[..., ::-1])):
            np.testing.assert_array_equal(task.preprocess(frames, SOUND, "bgr")["frames"], expected)
            for answer in (task(frames, color="bgr"), task.autoencode(frames, color="bgr")):
                np.testing.assert_array_equal(answer.video, task(FRAMES).video)
            assert task.label(frames, color="bgr") == task.label(FRAMES)
        images = [Image.fromarray(frame) for frame in FRAMES]
        np.testing.assert_array_equal(task.preprocess(images, SOUND, "bgr")["frames"], expected)


@pytest.mark.parametrize(
    ("batch", "queries", "most"), [(1, 7, 0), (1, 60, 0), (2, 7, 0), (1, "queries", 1000), (1, "queries", 11)]
)
def test_a_split_model_gives_what_the_whole_one_gives(batch: int, queries: int | str, most: int) -> None:
    described, engines = split(batch, queries, most)
    with task_of(*whole()) as expected, task_of(described, engines) as task:
        one, other = expected.autoencode(FRAMES, SOUND), task(FRAMES, SOUND)

    np.testing.assert_array_equal(one.video, other.video)
    np.testing.assert_array_equal(one.sound, other.sound)
    assert one.labels == other.labels
    assert len(engines["encoder"].calls) == 1


def test_several_samples_are_decoded_in_the_batches_of_a_split_model() -> None:
    described, engines = split(batch=2)
    with task_of(described, engines) as task:
        feeds = [task.preprocess(FRAMES[at:], SOUND[at:]) for at in range(3)]
        together = task.run_inputs({name: np.concatenate([one[name] for one in feeds]) for name in feeds[0]})
        alone = [task.run_inputs(one) for one in feeds]

    for name, array in together.items():
        np.testing.assert_array_equal(array, np.concatenate([one[name] for one in alone]))


def test_the_label_alone_decodes_nothing_else() -> None:
    described, engines = split()
    with task_of(described, engines) as task, task_of(*whole()) as other:
        assert task.label(FRAMES, SOUND, top=3) == other.label(FRAMES, SOUND, top=3)

    assert not engines["decoder_video"].calls
    assert not engines["decoder_sound"].calls


def test_progress_counts_the_queries_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perceiver_export.runtimes.tasks.video._QUERIES_A_STEP", 20)
    told: list[tuple[str, int, int | None]] = []
    described, engines = split(queries=7)
    with task_of(described, engines) as task:
        task.reconstruct(task.preprocess(FRAMES, SOUND), progress=lambda *told_now: told.append(told_now))

    assert [one for one in told if one[0] == "decode video"] == [
        ("decode video", done, 60) for done in (14, 28, 42, 56, 60)
    ]


def decoder_of(name: str, table: Any) -> tuple[Part, NumpyEngine]:
    """A decoder that reads its rows from a table (batch, queries, channels)."""
    batch, count, channels = table.shape
    inputs = (spec("latents", batch, 1, 1), spec("queries", batch, 50, dtype="int32"))
    part = Part(f"{name}.onnx", inputs, (spec(name, batch, 50, channels),), num_queries=count)

    def rows(feeds: Feeds) -> dict[str, Array]:
        return {name: np.stack([one[row] for one, row in zip(table, feeds["queries"], strict=True)])}

    return part, NumpyEngine(rows, part.inputs, part.outputs)


@pytest.mark.parametrize("folder", model_folders("video_autoencoding"))
def test_rows_are_joined_as_deepminds_code_joins_them(folder: Path) -> None:
    """The rows of each chunk of DeepMind's run, by their flat indices, are joined to DeepMind's video and sound."""
    with np.load(folder / "io.npz") as archive:
        io = dict(archive)
    batch, frames, height, width = io["out/image"].shape[:4]
    parts, engines = {}, {}
    for output, ours in (("image", "video"), ("audio", "sound")):
        points = np.concatenate([io[f"mid/chunk{i}/points_{output}"] for i in range(4)])
        # DeepMind's chunks of sound have the samples of their patches joined already: a row a patch again.
        chunks = [io[f"out/chunk{i}/{output}"].reshape(batch, len(points) // 4, -1) for i in range(4)]
        table = np.empty_like(np.concatenate(chunks, axis=1))
        table[:, points] = np.concatenate(chunks, axis=1)
        parts[f"decoder_{ours}"], engines[f"decoder_{ours}"] = decoder_of(ours, table)
    steps = VideoPreprocessing(frames, height, width, io["out/audio"].shape[1], RATE)

    def load(name: str | None) -> Runtime:
        engine = engines[name or ""]
        return Runtime(engine, engine.inputs, engine.outputs, "fp32")

    task, latents = VideoAutoencoding(manifest(parts, preprocessing=steps), load), np.zeros((batch, 1, 1), np.float32)

    np.testing.assert_array_equal(task.decode("video", latents), io["out/image"])
    np.testing.assert_array_equal(task.decode("sound", latents), io["out/audio"])


def test_directories_lists_arrays_and_npy_files_give_the_same(tmp_path: Path) -> None:
    directory = write_frames(tmp_path / "frames")
    np.save(tmp_path / "frames.npy", FRAMES)
    write_wav(tmp_path / "a.wav", SOUND, RATE)
    described, engine = whole()
    with task_of(described, engine) as task:
        for frames in (directory, str(directory), tmp_path / "frames.npy", FRAMES, list(FRAMES)):
            task(frames, tmp_path / "a.wav")
        task([directory / "f8.png", FRAMES[1], directory / "f10.png"], read_wav(tmp_path / "a.wav", RATE))

    for call in engine.calls[1:]:
        np.testing.assert_array_equal(call["frames"], engine.calls[0]["frames"])
        np.testing.assert_array_equal(call["audio"], engine.calls[0]["audio"])


def test_no_sound_is_silence() -> None:
    described, engine = whole()
    with task_of(described, engine) as task:
        task(FRAMES)

    assert not engine.calls[0]["audio"].any()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (FRAMES[: T - 1], "but got 2"),
        ([], "but got 0"),
        ([FRAMES[0], FRAMES[1], FRAMES[2, :8]], "frame 2 is 8 × 7"),
        (FRAMES.astype(np.float32), "float32"),
        (FRAMES[0], "uint8"),
        ("nowhere", "does not exist"),
        ("nowhere.npy", "does not exist"),
        (Path(__file__), "neither a directory"),
        (Path(__file__).parent, "no images"),
        (["nowhere.png"] * 3, "does not exist"),
    ],
)
def test_frames_that_are_no_video_are_refused(frames: Any, message: str) -> None:
    with task_of(*whole()) as task, pytest.raises(InputError, match=message):
        task(frames)


def test_short_sound_is_refused_and_top_is_checked_before_anything_runs() -> None:
    described, engine = whole()
    with task_of(described, engine) as task:
        with pytest.raises(InputError, match="10 samples"):
            task(FRAMES, SOUND[:10])
        with pytest.raises(UsageError):
            task(FRAMES, SOUND, top=0)
        with pytest.raises(UsageError):
            task.label(FRAMES, SOUND, top=0)

    assert not engine.calls


def test_psnr_is_its_definition() -> None:
    reference = np.zeros((2, 5), np.float32)

    assert psnr(reference, reference + np.float32(0.1)) == pytest.approx(20, abs=1e-5)
    assert psnr(reference, reference + np.float32(0.1), peak=2) == pytest.approx(20 + 20 * math.log10(2), abs=1e-5)
    assert psnr(reference, reference) == math.inf
    with pytest.raises(InputError):
        psnr(reference, reference[:1])


def test_manifests_that_do_not_fit_are_refused() -> None:
    described, _ = whole()
    split_manifest, _ = split()
    (inputs, outputs), parts = interface(1), split_manifest.parts
    wrong = [
        manifest(described.parts, preprocessing=None),
        manifest(described.parts, preprocessing=PointsPreprocessing(4)),
        manifest(described.parts, preprocessing=VideoPreprocessing(T, H, W + 1, SAMPLES, RATE)),
        manifest(described.parts, labels=("one", "two")),
        manifest({"model": Part("m", inputs[:1], outputs)}),
        manifest({"model": Part("m", inputs, outputs[:2])}),
        manifest({name: part for name, part in parts.items() if name != "decoder_sound"}, outputs),
        manifest({**parts, "decoder_video": Part("m", *interface(1))}, outputs),
        manifest({**parts, "decoder_video": Part("m", parts["decoder_video"].inputs, outputs[:1])}, outputs),
        manifest({**parts, "decoder_video": Part("m", (), parts["decoder_video"].outputs)}, outputs),
        manifest({**parts, "decoder_video": Part("m", parts["decoder_video"].inputs, (spec("video"),))}, outputs),
        manifest({**parts, "decoder_sound": msgspec.structs.replace(parts["decoder_sound"], num_queries=4)}, outputs),
    ]
    for one in wrong:
        with pytest.raises(BundleError):
            VideoAutoencoding.check(one)
