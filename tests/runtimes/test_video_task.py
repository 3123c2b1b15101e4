# SPDX-License-Identifier: Apache-2.0
"""Video autoencoding: what goes into the graphs, how their rows become a video, what `run` writes, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from perceiver_export.runtimes.errors import BundleError, InputError, UsageError
from perceiver_export.runtimes.manifest import Manifest, Part, TensorSpec
from perceiver_export.runtimes.preprocessing import PointsPreprocessing, VideoPreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds, Runtime
from perceiver_export.runtimes.tasks.images import prepare_frames
from perceiver_export.runtimes.tasks.sound import read_wav, wav_rate, write_wav
from perceiver_export.runtimes.tasks.video import VideoAutoencoding, psnr
from tests.runtimes import models
from tests.runtimes.conftest import Ask
from tests.runtimes.models import NumpyEngine, opened, spec
from tests.vector_folders import model_folders

T, H, W, SAMPLES, PATCH, LABELS, RATE = 3, 4, 5, 24, 8, 6, 48_000
FRAMES = np.random.default_rng(0).integers(0, 256, (T + 2, 9, 7, 3), dtype=np.uint8)
SOUND = (np.random.default_rng(1).random(SAMPLES + 10) * 2 - 1).astype(np.float32)
STEPS = VideoPreprocessing(T, H, W, SAMPLES, RATE)


def manifest(
    parts: dict[str, Part] | NumpyEngine, outputs: tuple[TensorSpec, ...] = (), steps: Any = STEPS, **changes: Any
) -> Manifest:
    return models.manifest("video-autoencoding", parts, steps, outputs=outputs, **changes)


def interface(batch: int) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs = (spec("frames", batch, T, H, W, 3), spec("audio", batch, SAMPLES, 1))
    outputs = (spec("video", batch, T, H, W, 3), spec("sound", batch, SAMPLES, 1), spec("label", batch, LABELS))
    return inputs, outputs


def answers(feeds: Feeds) -> dict[str, Any]:
    """Twice the video minus a half leaves [0, 1]; the label's scores are fixed."""
    scores = np.tile(np.array([0, 3, 1, 5, 2, 4], np.float32), (len(feeds["frames"]), 1))
    return {"video": feeds["frames"] * 2 - 0.5, "sound": feeds["audio"] * 3, "label": scores}


def whole(steps: VideoPreprocessing = STEPS) -> tuple[VideoAutoencoding, NumpyEngine]:
    engine = NumpyEngine(answers, *interface(1))
    return opened(VideoAutoencoding, manifest(engine, steps=steps), engine), engine


def split(batch: int = 1, queries: int | str = 7, most: int = 1000) -> tuple[VideoAutoencoding, dict[str, NumpyEngine]]:
    """Latents carry both inputs; each decoder computes its rows from them."""
    (inputs, outputs), size = interface(batch), T * H * W * 3
    latents = spec("latents", batch, 1, size + SAMPLES)
    some = {"queries": (1, most)} if isinstance(queries, str) else {}
    asked = spec("queries", batch, queries, dtype="int32", **some)
    video, sound = spec("video", batch, queries, 3, **some), spec("sound", batch, queries, PATCH, **some)

    def encode(feeds: Feeds) -> dict[str, Array]:
        flat = [feeds["frames"].reshape(batch, -1), feeds["audio"].reshape(batch, -1)]
        return {"latents": np.concatenate(flat, axis=1)[:, None]}

    def rows(feeds: Feeds, begin: int, width: int, change: Callable[[Array], Array]) -> Array:
        table = change(feeds["latents"][:, 0, begin:][:, : size if begin == 0 else SAMPLES]).reshape(batch, -1, width)
        return np.stack([one[row] for one, row in zip(table, feeds["queries"], strict=True)])

    def show(feeds: Feeds) -> dict[str, Array]:
        return {"video": rows(feeds, 0, 3, lambda x: x * 2 - 0.5)}

    def hear(feeds: Feeds) -> dict[str, Array]:
        return {"sound": rows(feeds, size, PATCH, lambda x: x * 3)}

    def score(feeds: Feeds) -> dict[str, Array]:
        return {"label": answers({"frames": feeds["latents"], "audio": feeds["latents"]})["label"]}

    engines = {
        "encoder": NumpyEngine(encode, inputs, (latents,)),
        "decoder_video": NumpyEngine(show, (latents, asked), (video,)),
        "decoder_sound": NumpyEngine(hear, (latents, asked), (sound,)),
        "decoder_label": NumpyEngine(score, (latents,), (outputs[2],)),
    }
    count = {"decoder_video": T * H * W, "decoder_sound": SAMPLES // PATCH}
    parts = {
        name: Part(f"{name}.onnx", engine.inputs, engine.outputs, num_queries=count.get(name))
        for name, engine in engines.items()
    }
    return opened(VideoAutoencoding, manifest(parts, outputs), engines), engines


def write_frames(directory: Path, frames: Any = FRAMES) -> Path:
    directory.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(directory / f"f{number + 8}.png")  # f10 comes after f9, not before
    return directory


def test_the_whole_model_gets_prepared_frames_and_sound_and_its_answer_is_clipped() -> None:
    task, engine = whole()
    found = task.autoencode(FRAMES, SOUND, top=2)

    prepared = prepare_frames(list(FRAMES[:T]), H, W)
    np.testing.assert_array_equal(engine.calls[0]["frames"], prepared[None])
    np.testing.assert_array_equal(engine.calls[0]["audio"][0, :, 0], SOUND[:SAMPLES])
    np.testing.assert_array_equal(found.video, np.clip(prepared * 2 - 0.5, 0, 1))
    np.testing.assert_array_equal(found.sound, np.clip(SOUND[:SAMPLES] * 3, -1, 1))
    assert [(one.label, one.index) for one in found.labels] == [("3", 3), ("5", 5)]
    assert found.frames.dtype == np.uint8
    np.testing.assert_allclose(found.frames / 255, found.video, atol=0.5 / 255 + 1e-6)
    task(FRAMES)
    assert not engine.calls[1]["audio"].any()  # no sound is silence


def test_frames_are_pillow_images_and_arrays_of_either_order() -> None:
    task, _ = whole()
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
    (expected, _), (task, engines) = whole(), split(batch, queries, most)
    one, other = expected.autoencode(FRAMES, SOUND), task(FRAMES, SOUND)

    np.testing.assert_array_equal(one.video, other.video)
    np.testing.assert_array_equal(one.sound, other.sound)
    assert one.labels == other.labels
    assert len(engines["encoder"].calls) == 1


def test_several_samples_are_decoded_in_the_batches_of_a_split_model() -> None:
    task, _ = split(batch=2)
    feeds = [task.preprocess(FRAMES[at:], SOUND[at:]) for at in range(3)]
    together = task.run_inputs({name: np.concatenate([one[name] for one in feeds]) for name in feeds[0]})
    alone = [task.run_inputs(one) for one in feeds]

    for name, array in together.items():
        np.testing.assert_array_equal(array, np.concatenate([one[name] for one in alone]))


def test_the_label_alone_decodes_nothing_else() -> None:
    (task, engines), (other, _) = split(), whole()

    assert task.label(FRAMES, SOUND, top=3) == other.label(FRAMES, SOUND, top=3)
    assert not engines["decoder_video"].calls
    assert not engines["decoder_sound"].calls


def test_progress_counts_the_queries_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perceiver_export.runtimes.tasks.video._QUERIES_A_STEP", 20)
    told: list[tuple[str, int, int | None]] = []
    task, _ = split(queries=7)
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

    task, latents = VideoAutoencoding(manifest(parts, steps=steps), load), np.zeros((batch, 1, 1), np.float32)

    np.testing.assert_array_equal(task.decode("video", latents), io["out/image"])
    np.testing.assert_array_equal(task.decode("sound", latents), io["out/audio"])


def test_directories_lists_arrays_and_npy_files_give_the_same(tmp_path: Path) -> None:
    directory = write_frames(tmp_path / "frames")
    np.save(tmp_path / "frames.npy", FRAMES)
    write_wav(tmp_path / "a.wav", SOUND, RATE)
    task, engine = whole()
    for frames in (directory, str(directory), tmp_path / "frames.npy", FRAMES, list(FRAMES)):
        task(frames, tmp_path / "a.wav")
    task([directory / "f8.png", FRAMES[1], directory / "f10.png"], read_wav(tmp_path / "a.wav", RATE))

    for call in engine.calls[1:]:
        np.testing.assert_array_equal(call["frames"], engine.calls[0]["frames"])
        np.testing.assert_array_equal(call["audio"], engine.calls[0]["audio"])


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
    with pytest.raises(InputError, match=message):
        whole()[0](frames)


def test_short_sound_is_refused_and_top_is_checked_before_anything_runs() -> None:
    task, engine = whole()
    with pytest.raises(InputError, match="10 samples"):
        task(FRAMES, SOUND[:10])
    for call in (task, task.label):
        with pytest.raises(UsageError):
            call(FRAMES, SOUND, top=0)
    assert not engine.calls


def test_psnr_is_its_definition() -> None:
    reference = np.zeros((2, 5), np.float32)

    assert psnr(reference, reference + np.float32(0.1)) == pytest.approx(20, abs=1e-5)
    assert psnr(reference, reference + np.float32(0.1), peak=2) == pytest.approx(20 + 20 * math.log10(2), abs=1e-5)
    assert psnr(reference, reference) == math.inf
    with pytest.raises(InputError):
        psnr(reference, reference[:1])


def test_manifests_that_do_not_fit_are_refused() -> None:
    described, parts = whole()[0].manifest, split()[0].manifest.parts
    inputs, outputs = interface(1)
    wrong = [
        manifest(described.parts, steps=None),
        manifest(described.parts, steps=PointsPreprocessing(4)),
        manifest(described.parts, steps=VideoPreprocessing(T, H, W + 1, SAMPLES, RATE)),
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


def test_run_writes_frames_and_sound(ask: Ask, tmp_path: Path) -> None:
    frames, out = write_frames(tmp_path / "frames"), tmp_path / "out"
    write_wav(tmp_path / "a.wav", SOUND, RATE)
    task, engine = whole()
    shown = ask(task, frames, tmp_path / "a.wav", output=out)

    assert "the first 3 of 5 frames (f8.png to f10.png)" in shown
    assert "dB" in shown
    video = np.clip(engine.calls[0]["frames"][0] * 2 - 0.5, 0, 1)
    written = [np.asarray(Image.open(file)) for file in sorted(out.glob("frame_*.png"))]
    np.testing.assert_array_equal(np.stack(written), np.round(video * 255))
    assert sorted(file.name for file in out.iterdir()) == [*(f"frame_000{n}.png" for n in range(T)), "sound.wav"]
    np.testing.assert_allclose(read_wav(out / "sound.wav", RATE), np.clip(SOUND[:SAMPLES] * 3, -1, 1), atol=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.wav", "frames", "out"]


def test_where_no_rate_is_known_the_files_own_is_kept_and_none_is_claimed(ask: Ask, tmp_path: Path) -> None:
    task, engine = whole(msgspec.structs.replace(STEPS, sample_rate=None))
    frames, sound = write_frames(tmp_path / "frames"), tmp_path / "a.wav"
    write_wav(sound, SOUND, 11_025)
    ask(task, frames, sound, output=tmp_path / "with")
    ask(task, frames, output=tmp_path / "without")

    assert not (tmp_path / "without" / "sound.wav").exists()
    assert wav_rate(tmp_path / "with" / "sound.wav") == 11_025
    np.testing.assert_array_equal(engine.calls[0]["audio"][0, :, 0], read_wav(sound, None)[:SAMPLES])


def test_run_prints_json(ask: Ask, tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", FRAMES[:T])
    task, engine = whole()
    document = ask(task, tmp_path / "frames.npy", top=1, as_json=True)

    assert document["labels"][0]["index"] == 3
    assert document["frames"] == {"used": T, "there": T, "first": None, "last": None}
    assert list(document["psnr"]) == ["video"]
    video = engine.calls[0]["frames"]
    error = float(np.mean((video.astype(np.float64) - np.clip(video * 2 - 0.5, 0, 1)) ** 2))
    assert document["psnr"]["video"] == pytest.approx(-10 * math.log10(error), abs=1e-4)


def test_run_refuses_what_it_cannot_do_before_the_model_runs(ask: Ask, tmp_path: Path) -> None:
    full, (task, engine) = write_frames(tmp_path / "frames"), whole()
    for output in (full, full / "f8.png", tmp_path / "no" / "out"):
        with pytest.raises((InputError, UsageError)):
            ask(task, full, output=output)
    wrong: tuple[tuple[int, dict[str, Any]], ...] = ((3, {}), (1, {"output": tmp_path / "out.mp4"}), (1, {"top": 0}))
    for count, options in wrong:
        with pytest.raises(UsageError):
            ask(task, *[full] * count, **options)
    assert not engine.calls
