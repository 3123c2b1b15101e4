# SPDX-License-Identifier: Apache-2.0
"""The task of optical flow around models that are small functions, and what `run` writes of it and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from perceiver_export.exporter.cli import run_frames
from perceiver_export.runtimes.errors import BundleError, InputError, RuntimeClosedError, UsageError
from perceiver_export.runtimes.manifest import Manifest, Part
from perceiver_export.runtimes.preprocessing import FlowPreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks.flow import OpticalFlow
from perceiver_export.runtimes.tasks.flow_files import flow_image
from perceiver_export.runtimes.tasks.image_files import ImageLike, read_image
from tests.runtimes import models
from tests.runtimes.conftest import Ask
from tests.runtimes.models import NumpyEngine, opened, spec
from tests.vector_folders import model_folders


def manifest(tile: tuple[int, int], batch: int | str = 1, split: bool = False, overlap: int = 4) -> Manifest:
    ranges = {} if isinstance(batch, int) else {batch: (2, 3)}
    frames, flow = spec("frames", batch, 2, 3, *tile, **ranges), spec("flow", batch, *tile, 2, **ranges)
    latents, queries = spec("latents", batch, 1, 2, **ranges), spec("queries", batch, 50, dtype="int32", **ranges)
    parts = {"model": Part("model.onnx", (frames,), (flow,))}
    if split:
        decoder = Part("d.onnx", (latents, frames, queries), (spec("flow", batch, 50, 2, **ranges),))
        parts = {
            "encoder": Part("e.onnx", (frames,), (latents,)),
            "decoder": msgspec.structs.replace(decoder, num_queries=tile[0] * tile[1]),
        }
    steps = FlowPreprocessing(*tile, overlap)
    return models.manifest("optical-flow", parts, steps, outputs=(flow,) if split else ())


def latents_of(feeds: Feeds) -> dict[str, Array]:
    """Something that depends on the whole tile."""
    return {"latents": feeds["frames"].mean(axis=(3, 4))[:, None, :, 0]}


def all_pixels(feeds: Feeds) -> dict[str, Array]:
    """(B, h, w, 2): red of both frames, and the latents."""
    red = feeds["frames"][:, :, 0].transpose(0, 2, 3, 1)
    return {"flow": red * 3 + latents_of(feeds)["latents"][:, :, None]}


def some_pixels(feeds: Feeds) -> dict[str, Array]:
    every = all_pixels({"frames": feeds["frames"]})["flow"].reshape(len(feeds["frames"]), -1, 2)
    np.testing.assert_array_equal(feeds["latents"], latents_of(feeds)["latents"])
    return {"flow": np.take_along_axis(every, feeds["queries"][:, :, None], axis=1)}


def open_fake(described: Manifest) -> tuple[OpticalFlow, dict[str, NumpyEngine]]:
    functions = {"encoder": latents_of, "decoder": some_pixels}
    engines = {
        name: NumpyEngine(functions.get(name, all_pixels), part.inputs, part.outputs)
        for name, part in described.parts.items()
    }
    frames = next(iter(described.parts.values())).inputs
    outputs = described.outputs or described.parts["model"].outputs
    engines["whole"] = NumpyEngine(all_pixels, frames, outputs)
    return opened(OpticalFlow, described, engines), engines


def picture(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("folder", model_folders("optical_flow"))
@pytest.mark.parametrize("key", ["big", "flush"])
@pytest.mark.parametrize("batch", [1, 4])
def test_big_frames_are_cut_and_stitched_as_deepmind_does(folder: Path, key: str, batch: int) -> None:
    with np.load(folder / "io.npz") as io:
        inputs, pixels = io[f"in/{key}_frames"], io[f"in/{key}_frames_uint8"]
        corners, flows, expected = io[f"mid/{key}_grid"], io[f"mid/{key}_tile_flows"], io[f"out/{key}_flow"]
    height, width = flows.shape[1:3]
    recorded = {}
    for (top, left), tile_flow in zip(corners.tolist(), flows, strict=True):
        tile = inputs[:, top : top + height, left : left + width].transpose(0, 3, 1, 2)
        recorded[np.ascontiguousarray(tile).tobytes()] = tile_flow
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    flow, fakes = open_fake(manifest((height, width), batch, overlap=config["tiling"]["min_overlap"]))
    # Found only where the input is DeepMind's to the bit.
    model = fakes["whole"]
    model.function = lambda feeds: {"flow": np.stack([recorded[tile.tobytes()] for tile in feeds["frames"]])}

    found = flow(pixels[0], pixels[1])

    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[0], rtol=0, atol=3e-6)
    assert len(model.calls) == -(-len(recorded) // batch)


@pytest.mark.parametrize("batch", [1, 3, "batch"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("region", [(0, 0, 1, 1), (5, 7, 9, 20), (17, 30, 11, 15), (0, 0, 28, 45), (27, 44, 1, 1)])
def test_a_region_is_cut_from_the_whole_flow(batch: int | str, split: bool, region: tuple[int, int, int, int]) -> None:
    flow, fakes = open_fake(manifest((16, 24), batch, split))
    first, second = picture(28, 45, 1), picture(28, 45, 2)
    whole = flow(first, second)
    runs = len(fakes["whole"].calls)
    top, left, height, width = region

    found = flow.region(first, second, *region)

    np.testing.assert_allclose(found, whole[top : top + height, left : left + width], rtol=0, atol=1e-6)
    if split:
        assert len(fakes["whole"].calls) == runs  # the joined model ran only for `whole`
        if height * width == 1:
            decoded = [set(row) for call in fakes["decoder"].calls for row in call["queries"].tolist()]
            assert all(len(pixels) == 1 for pixels in decoded)
    if batch == 1 and region == (0, 0, 1, 1):
        assert runs == 6
        ran = len(fakes["encoder"].calls) if split else len(fakes["whole"].calls) - runs
        assert ran == 1  # only the corner's tile


def test_regions_outside_the_frame_are_refused() -> None:
    flow, _ = open_fake(manifest((16, 24)))
    for region in [(-1, 0, 2, 2), (0, -1, 2, 2), (0, 0, 0, 2), (0, 0, 2, 0), (27, 0, 2, 2), (0, 44, 1, 2)]:
        with pytest.raises(InputError, match="is not in a frame of 28 × 45"):
            flow.region(picture(28, 45), picture(28, 45), *region)


def test_tiles_fill_batches_and_progress_is_told() -> None:
    flow, fakes = open_fake(manifest((16, 24), "batch"))  # 2 or 3 tiles at a time
    told = []

    flow(picture(24, 40), picture(24, 40, 1), lambda done, total: told.append((done, total)))

    assert told == [(0, 4), (3, 4)]
    assert [len(call["frames"]) for call in fakes["whole"].calls] == [3, 2]
    np.testing.assert_array_equal(*fakes["whole"].calls[1]["frames"])


def test_frames_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    flow, fakes = open_fake(manifest((16, 24)))
    Image.fromarray(picture(30, 30)).save(tmp_path / "a.png")
    refused: list[tuple[ImageLike, ImageLike, str]] = [
        (picture(30, 30), picture(30, 31), r"the first frame has 30 × 30 pixels, the second frame has 30 × 31"),
        (tmp_path / "a.png", picture(31, 30), r"a\.png has 30 × 30 pixels"),
        (picture(15, 30), picture(15, 30), r"15 × 30 pixels, but the model needs at least 16 × 24"),
        (picture(30, 23), picture(30, 23), r"30 × 23 pixels, but the model needs at least 16 × 24"),
        (picture(30, 30).astype(np.float32), picture(30, 30), "dtype float32"),
        (tmp_path / "absent.png", picture(30, 30), "does not exist"),
    ]
    for first, second, message in refused:
        with pytest.raises(InputError, match=message) as raised:
            flow(first, second)
        assert len(raised.value.hint) > 10
    assert not fakes["whole"].calls


def test_frames_of_a_directory_go_in_pairs(tmp_path: Path) -> None:
    flow, _ = open_fake(manifest((16, 24)))
    frames = [picture(16, 24, seed) for seed in range(3)]
    for number, frame in zip((2, 10, 9), frames, strict=True):
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    expected = [flow(frames[0], frames[2]), flow(frames[2], frames[1])]

    lazy: list[ImageLike] = [frames[0], tmp_path / "frame9.png", frames[1]]

    for found in (flow.frames(tmp_path), flow.frames([frames[0], frames[2], frames[1]]), flow.frames(iter(lazy))):
        np.testing.assert_array_equal(list(found), expected)


def test_frames_are_paths_pillow_images_and_arrays_of_either_order(tmp_path: Path) -> None:
    flow, _ = open_fake(manifest((16, 24)))
    first, second = picture(16, 24, 0), picture(16, 24, 1)
    bgr = first[:, :, ::-1], second[:, :, ::-1]
    Image.fromarray(first).save(tmp_path / "a.png")
    expected = flow(first, second)

    assert not np.array_equal(flow(bgr[0], bgr[1]), expected)
    np.testing.assert_array_equal(flow(bgr[0], bgr[1], color="bgr"), expected)
    np.testing.assert_array_equal(flow.region(bgr[0], bgr[1], 0, 0, 16, 24, color="bgr"), expected)
    np.testing.assert_array_equal(next(flow.frames(bgr, color="bgr")), expected)
    np.testing.assert_array_equal(flow(tmp_path / "a.png", Image.fromarray(second), color="bgr"), expected)


def test_fewer_than_two_frames_are_refused(tmp_path: Path) -> None:
    flow, _ = open_fake(manifest((16, 24)))
    Image.fromarray(picture(16, 24)).save(tmp_path / "a.png")
    for frames in (tmp_path, [picture(16, 24)], [], picture(16, 24)):
        with pytest.raises(InputError, match=r"two frames, but got [01]\nhint: "):
            flow.frames(frames)
    with pytest.raises(InputError, match=r"two frames, but got 1\nhint: "):
        list(flow.frames(iter([picture(16, 24)])))


def test_a_later_frame_of_another_size_is_named() -> None:
    flow, _ = open_fake(manifest((16, 24)))
    flows = flow.frames([picture(16, 24), picture(16, 24), picture(17, 24)])
    next(flows)

    with pytest.raises(InputError, match=r"frame 1 has 16 × 24 pixels, frame 2 has 17 × 24"):
        next(flows)


def test_manifests_of_other_models_are_refused() -> None:
    good, changed = manifest((16, 24), split=True), msgspec.structs.replace
    decoder = good.parts["decoder"]
    halves = changed(decoder, inputs=decoder.inputs[:2]), changed(decoder, num_queries=100)
    wrong_fields: list[dict[str, Any]] = [
        *({"preprocessing": steps} for steps in (None, FlowPreprocessing(16, 24, 16), FlowPreprocessing(16, 25, 4))),
        {"parts": {"encoder": good.parts["encoder"]}},
        *({"parts": {**good.parts, "decoder": half}} for half in halves),
    ]
    for wrong in wrong_fields:
        with pytest.raises(BundleError):
            OpticalFlow.check(changed(good, **wrong))


def test_closing_closes_every_part() -> None:
    flow, _ = open_fake(manifest((16, 24), split=True))
    with flow:
        parts = [flow.part(name) for name in ("encoder", "decoder")]

    for part in parts:
        with pytest.raises(RuntimeClosedError):
            part.describe()


Run = Callable[..., Any]


@pytest.fixture
def run(ask: Ask) -> Run:
    """`run` on a model with tiles of 16 × 24."""
    return partial(ask, open_fake(manifest((16, 24)))[0])


@pytest.fixture
def frames(tmp_path: Path) -> list[str]:
    """Three frames in a directory of their own."""
    (tmp_path / "in").mkdir()
    paths = [tmp_path / "in" / f"frame{number}.png" for number in (1, 2, 10)]
    for seed, path in enumerate(paths):
        Image.fromarray(picture(20, 30, seed)).save(path)
    return list(map(str, paths))


def expected_flow(first: str, second: str) -> npt.NDArray[np.float32]:
    return open_fake(manifest((16, 24)))[0](first, second)


def flow_of(path: Path) -> npt.NDArray[np.float32]:
    content = path.read_bytes()
    width, height = np.frombuffer(content, "<i4", 2, offset=4)
    return np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2)


@pytest.mark.parametrize("ending", [".flo", ".npy", ".png"])
def test_run_writes_one_flow(run: Run, frames: list[str], tmp_path: Path, ending: str) -> None:
    output = tmp_path / f"flow{ending}"
    shown = run(*frames[:2], output=output)

    flow = expected_flow(*frames[:2])
    if ending == ".png":
        np.testing.assert_array_equal(read_image(output), flow_image(flow))
    else:
        np.testing.assert_array_equal(flow_of(output) if ending == ".flo" else np.load(output), flow)
    assert "frame1.png" in shown
    assert f"{np.hypot(*flow.transpose(2, 0, 1)).max():.2f}" in shown
    assert f"flow{ending}" in shown.replace("\n", "")


def test_run_writes_a_directory_of_flows(run: Run, frames: list[str], tmp_path: Path) -> None:
    shown = run(tmp_path / "in", output=tmp_path / "out", as_json=True)

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "frame1.flo", "frame1.png", "frame2.flo", "frame2.png",
    ]  # fmt: skip
    np.testing.assert_array_equal(flow_of(tmp_path / "out" / "frame2.flo"), expected_flow(frames[1], frames[2]))
    assert [pair["frames"] for pair in shown["pairs"]] == [frames[:2], frames[1:]]
    flow = expected_flow(frames[0], frames[1])
    lengths = np.hypot(flow[..., 0], flow[..., 1])
    first = shown["pairs"][0]
    assert (first["height"], first["width"]) == (20, 30)
    assert first["mean"] == pytest.approx(lengths.mean(), rel=1e-5)
    assert first["max"] == pytest.approx(lengths.max(), rel=1e-5)
    assert first["files"] == [str(tmp_path / "out" / name) for name in ("frame1.flo", "frame1.png")]


def test_run_without_output_says_how_to_write(run: Run, frames: list[str], tmp_path: Path) -> None:
    shown = run(*frames)

    assert ".flo" in shown
    assert shown.count("frame2.png") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_frames_of_one_name_are_told_apart_and_do_not_overwrite_each_other(
    run: Run, frames: list[str], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    same = tmp_path / "other" / "frame1.png"
    Image.open(frames[1]).save(same)

    run(frames[0], same, frames[2], output=tmp_path / "out", as_json=True)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.flo"))
    assert names == ["00000_frame1.flo", "00001_frame1.flo"]
    assert set(re.findall(r"\S+/frame1\.png", run(frames[0], same))) == {"in/frame1.png", "other/frame1.png"}

    Image.fromarray(picture(20, 31)).save(same)
    with pytest.raises(InputError, match=f"{frames[0]} has 20 × 30 pixels, {same} has 20 × 31"):
        run(frames[0], same)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, InputError])
def test_a_directory_is_whole_or_not_there(
    run: Run, frames: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, stop: type[BaseException]
) -> None:
    """The second flow never comes: the third frame is of another size, or somebody has had enough."""
    seen = []

    def summarize(flow: Any) -> Any:
        seen.append(list(tmp_path.glob(".*/*.flo")))
        if stop is KeyboardInterrupt:
            raise KeyboardInterrupt
        return {"mean": 0, "max": 0, "direction": "still"}

    monkeypatch.setattr(run_frames, "summarize", summarize)
    Image.fromarray(picture(20, 31)).save(frames[2])
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(stop):
        run(*frames, output=tmp_path / "out")

    assert [len(files) for files in seen] == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == (["in", "out"] if there else ["in"])
    assert not there or not any((tmp_path / "out").iterdir())


def test_run_refuses_before_it_runs(run: Run, frames: list[str], tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "empty").mkdir()
    for inputs, output in [
        (frames[:1], None),
        ([str(tmp_path / "empty")], None),
        ([str(tmp_path / "in"), frames[0]], None),
        (frames[:2], tmp_path / "flow.jpg"),
        (frames[:2], tmp_path / "absent" / "flow.flo"),
        (frames, tmp_path / "flow.flo"),
        (frames, tmp_path / "taken"),
        (frames, tmp_path / "in"),
        (frames[:2], Path(frames[1])),
        (frames, tmp_path / "absent" / "out"),
    ]:
        with pytest.raises((InputError, UsageError)) as raised:
            run(*inputs, output=output, opens=False)
        assert len(raised.value.hint) > 10


DIRECTIONS = {
    "right": (3, 0.2), "down and right": (3, 3), "down": (0, 3), "down and left": (-3, 3), "left": (-3, 0),
    "up and left": (-3, -3), "up": (0, -3), "up and right": (3, -3), "still": (0.01, 0), "not a number": (np.nan, 0),
}  # fmt: skip


def test_directions_in_words() -> None:
    flows = {name: np.broadcast_to(np.array(xy, np.float32), (4, 4, 2)) for name, xy in DIRECTIONS.items()}
    zoom = np.stack(np.meshgrid(np.arange(-3, 4), np.arange(-3, 4)), axis=-1).astype(np.float32)

    for name, flow in {**flows, "mixed": zoom}.items():
        assert run_frames.summarize(flow)["direction"] == name
