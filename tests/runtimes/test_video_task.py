# SPDX-License-Identifier: Apache-2.0
"""Video autoencoding: what goes into the graphs, how their rows become a video, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.exporter.cli.run_video import run
from perceiver_export.runtimes.audio_files import read_wav, write_wav
from perceiver_export.runtimes.errors import BundleError, InputError, UsageError
from perceiver_export.runtimes.manifest import Manifest, Part, TensorSpec
from perceiver_export.runtimes.preprocessing import PointsPreprocessing, VideoPreprocessing
from perceiver_export.runtimes.runtime import Feeds, Runtime
from perceiver_export.runtimes.tasks.video_autoencoding import VideoAutoencoding, psnr
from perceiver_export.runtimes.video_frames import prepare_frames
from tests.vector_folders import model_folders

T, H, W, SAMPLES, PATCH, LABELS = 3, 4, 5, 24, 8, 6
RATE = 48000
FRAMES = np.random.default_rng(0).integers(0, 256, (T + 2, 9, 7, 3), dtype=np.uint8)
SOUND = (np.random.default_rng(1).random(SAMPLES + 10) * 2 - 1).astype(np.float32)


class Engine:
    """Computes in numpy, and counts."""

    def __init__(
        self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], compute: Callable[[Feeds], Any]
    ) -> None:
        self.inputs, self.outputs, self.compute = inputs, outputs, compute
        self.calls: list[Feeds] = []

    def run(self, feeds: Feeds) -> dict[str, Any]:
        self.calls.append(feeds)
        return {self.outputs[0].name: self.compute(feeds)} if len(self.outputs) == 1 else self.compute(feeds)

    def run_into(self, feeds: Feeds, out: Any) -> None:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {"engine": "numpy", "version": "0", "device": "here"}


def spec(name: str, *shape: int | str, dtype: Any = "float32", **ranges: tuple[int, int]) -> TensorSpec:
    return TensorSpec(name, dtype, shape, "", ranges)


def manifest(parts: dict[str, Part], outputs: tuple[TensorSpec, ...] = (), **changes: Any) -> Manifest:
    steps = VideoPreprocessing(T, H, W, SAMPLES, RATE)
    given = {"preprocessing": steps, "labels": (), **changes}
    return Manifest(
        1, "m", "video-autoencoding", "deepmind", "", {}, parts, verification=(), tools={}, files={}, precision="fp32",
        outputs=outputs, **given,
    )  # fmt: skip


def interface(batch: int | str, **ranges: tuple[int, int]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs = (spec("frames", batch, T, H, W, 3, **ranges), spec("audio", batch, SAMPLES, 1, **ranges))
    outputs = (
        spec("video", batch, T, H, W, 3, **ranges),
        spec("sound", batch, SAMPLES, 1, **ranges),
        spec("label", batch, LABELS, **ranges),
    )
    return inputs, outputs


def answers(feeds: Feeds) -> dict[str, Any]:
    """Twice the video minus a half leaves [0, 1]; the label's scores are fixed."""
    scores = np.tile(np.array([0, 3, 1, 5, 2, 4], np.float32), (len(feeds["frames"]), 1))
    return {"video": feeds["frames"] * 2 - 0.5, "sound": feeds["audio"] * 3, "label": scores}


def whole(batch: int | str = 1, **ranges: tuple[int, int]) -> tuple[Manifest, Engine]:
    inputs, outputs = interface(batch, **ranges)
    return manifest({"model": Part("m.onnx", inputs, outputs)}), Engine(inputs, outputs, answers)


def split(batch: int = 1, queries: int | str = 7, most: int = 1000) -> tuple[Manifest, dict[str, Engine]]:
    """Latents carry both inputs; each decoder computes its rows from them."""
    (inputs, outputs), size = interface(batch), T * H * W * 3
    latents = spec("latents", batch, 1, size + SAMPLES)
    some = {"queries": (1, most)} if isinstance(queries, str) else {}
    asked = spec("queries", batch, queries, dtype="int32", **some)
    video, sound = spec("video", batch, queries, 3, **some), spec("sound", batch, queries, PATCH, **some)

    def encode(feeds: Feeds) -> Any:
        flat = [feeds["frames"].reshape(batch, -1), feeds["audio"].reshape(batch, -1)]
        return np.concatenate(flat, axis=1)[:, None]

    def rows(feeds: Feeds, begin: int, width: int, change: Callable[[Any], Any]) -> Any:
        table = change(feeds["latents"][:, 0, begin:][:, : size if begin == 0 else SAMPLES]).reshape(batch, -1, width)
        return np.stack([one[row] for one, row in zip(table, feeds["queries"], strict=True)])

    def score(feeds: Feeds) -> Any:
        return answers({"frames": feeds["latents"], "audio": feeds["latents"]})["label"]

    engines = {
        "encoder": Engine(inputs, (latents,), encode),
        "decoder_video": Engine((latents, asked), (video,), lambda f: rows(f, 0, 3, lambda x: x * 2 - 0.5)),
        "decoder_sound": Engine((latents, asked), (sound,), lambda f: rows(f, size, PATCH, lambda x: x * 3)),
        "decoder_label": Engine((latents,), (outputs[2],), score),
    }
    count = {"decoder_video": T * H * W, "decoder_sound": SAMPLES // PATCH}
    parts = {
        name: Part(f"{name}.onnx", engine.inputs, engine.outputs, num_queries=count.get(name))
        for name, engine in engines.items()
    }
    return manifest(parts, outputs), engines


def task_of(described: Manifest, engines: Engine | dict[str, Engine]) -> VideoAutoencoding:
    VideoAutoencoding.check(described)

    def load(name: str | None) -> Runtime:
        engine = engines if isinstance(engines, Engine) else engines[name or "whole"]
        return Runtime(engine, engine.inputs, engine.outputs, "fp32")

    return VideoAutoencoding(described, load)


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
    assert found.pictures.dtype == np.uint8
    np.testing.assert_allclose(found.pictures / 255, found.video, atol=0.5 / 255 + 1e-6)


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
    monkeypatch.setattr("perceiver_export.runtimes.tasks.video_autoencoding._QUERIES_A_STEP", 20)
    told: list[tuple[str, int, int | None]] = []
    described, engines = split(queries=7)
    with task_of(described, engines) as task:
        task.reconstruct(task.preprocess(FRAMES, SOUND), progress=lambda *told_now: told.append(told_now))

    assert [one for one in told if one[0] == "decode video"] == [
        ("decode video", done, 60) for done in (14, 28, 42, 56, 60)
    ]


def decoder_of(name: str, table: Any) -> tuple[Part, Engine]:
    """A decoder that reads its rows from a table (batch, queries, channels)."""
    batch, count, channels = table.shape
    inputs = (spec("latents", batch, 1, 1), spec("queries", batch, 50, dtype="int32"))
    part = Part(f"{name}.onnx", inputs, (spec(name, batch, 50, channels),), num_queries=count)

    def rows(feeds: Feeds) -> Any:
        return np.stack([one[row] for one, row in zip(table, feeds["queries"], strict=True)])

    return part, Engine(part.inputs, part.outputs, rows)


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


def write_frames(directory: Path, frames: Any = FRAMES) -> Path:
    directory.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(directory / f"f{number + 8}.png")  # f10 comes after f9, not before
    return directory


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
        (FRAMES[: T - 1], "frames given: 2"),
        ([], "frames given: 0"),
        ([FRAMES[0], FRAMES[1], FRAMES[2, :8]], "frame 2 is 8 × 7, frame 0 is 9 × 7"),
        (FRAMES.astype(np.float32), "float32"),
        (FRAMES[0], "shape"),
        ("nowhere", "does not exist"),
        ("nowhere.npy", "does not exist"),
        (Path(__file__), "neither a directory"),
        (Path(__file__).parent, "no pictures"),
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


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Engine:
    described, engine = whole()
    monkeypatch.setattr("perceiver_export.runtimes.tasks.open_task", lambda *_: task_of(described, engine))
    return engine


OPTIONS = RunOptions(top=2, device="auto", threads=None, json=False)


def test_run_writes_frames_and_sound(opened: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_run_prints_json(opened: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_run_refuses_what_it_cannot_do_before_the_model_runs(opened: Engine, tmp_path: Path) -> None:
    full = write_frames(tmp_path / "frames")
    for output in (full, full / "f8.png", tmp_path / "no" / "out"):
        with pytest.raises(InputError):
            run("bundle", [str(full)], output, OPTIONS)
    with pytest.raises(UsageError):
        run("bundle", [str(full)] * 3, None, OPTIONS)
    with pytest.raises(UsageError):
        run("bundle", [str(full)], None, RunOptions(0, "auto", None, json=False))

    assert not opened.calls
