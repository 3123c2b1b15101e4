# SPDX-License-Identifier: Apache-2.0
"""The task of optical flow and its command, around models that are small functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import perceiver_export.runtimes.tasks
from perceiver_export.exporter.cli import run_flow
from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.runtimes.errors import BundleError, InputError, UsageError
from perceiver_export.runtimes.flow_files import flow_picture, read_flo
from perceiver_export.runtimes.manifest import Manifest, Part, TensorSpec
from perceiver_export.runtimes.pictures import read_picture
from perceiver_export.runtimes.preprocessing import FlowPreprocessing
from perceiver_export.runtimes.tasks.optical_flow import FrameLike, OpticalFlow
from tests.vector_folders import model_folders

Array = npt.NDArray[Any]


class Fake:
    """A graph made of a function of its feeds; counts calls."""

    def __init__(self, part: Part, function: Callable[[dict[str, Array]], dict[str, Array]]) -> None:
        self.inputs, self.outputs, self.function = part.inputs, part.outputs, function
        self.calls: list[dict[str, Array]] = []
        self.closed = False

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        for spec in self.inputs:
            array = feeds[spec.name]
            assert array.dtype == np.dtype(spec.dtype)
            for size, found in zip(spec.shape, array.shape, strict=True):
                least, most = spec.ranges[size] if isinstance(size, str) else (size, size)
                assert least <= found <= most, spec.name
        assert feeds.keys() == {spec.name for spec in self.inputs}
        self.calls.append(dict(feeds))
        return self.function(dict(feeds))

    def describe(self) -> dict[str, Any]:
        return {"engine": "fake", "version": "1", "device": "none"}

    def close(self) -> None:
        self.closed = True


def manifest(tile: tuple[int, int], batch: int | str = 1, split: bool = False, overlap: int = 4) -> Manifest:
    def spec(name: str, dtype: Any, *shape: int) -> TensorSpec:
        return TensorSpec(name, dtype, (batch, *shape), ranges={} if isinstance(batch, int) else {batch: (2, 3)})

    frames, flow = spec("frames", "float32", 2, 3, *tile), spec("flow", "float32", *tile, 2)
    latents, queries = spec("latents", "float32", 1, 2), spec("queries", "int32", 50)
    parts = {"model": Part("model.onnx", (frames,), (flow,))}
    if split:
        decoder = Part("d.onnx", (latents, frames, queries), (spec("flow", "float32", 50, 2),))
        parts = {
            "encoder": Part("e.onnx", (frames,), (latents,)),
            "decoder": msgspec.structs.replace(decoder, num_queries=tile[0] * tile[1]),
        }
    return Manifest(
        1, "fake", "optical-flow", "deepmind", "", {}, parts, FlowPreprocessing(*tile, overlap), (), "float32", (),
        {}, {}, outputs=(flow,) if split else (),
    )  # fmt: skip


def latents_of(feeds: dict[str, Array]) -> dict[str, Array]:
    """Something that depends on the whole tile."""
    return {"latents": feeds["frames"].mean(axis=(3, 4))[:, None, :, 0]}


def all_pixels(feeds: dict[str, Array]) -> dict[str, Array]:
    """(B, h, w, 2): red of both frames, and the latents."""
    red = feeds["frames"][:, :, 0].transpose(0, 2, 3, 1)
    return {"flow": red * 3 + latents_of(feeds)["latents"][:, :, None]}


def some_pixels(feeds: dict[str, Array]) -> dict[str, Array]:
    every = all_pixels({"frames": feeds["frames"]})["flow"].reshape(len(feeds["frames"]), -1, 2)
    np.testing.assert_array_equal(feeds["latents"], latents_of(feeds)["latents"])
    return {"flow": np.take_along_axis(every, feeds["queries"][:, :, None], axis=1)}


def open_fake(described: Manifest) -> tuple[OpticalFlow, dict[str | None, Fake]]:
    OpticalFlow.check(described)
    functions = {"encoder": latents_of, "decoder": some_pixels}
    fakes: dict[str | None, Fake] = {
        name: Fake(part, functions.get(name, all_pixels)) for name, part in described.parts.items()
    }
    frames = next(iter(described.parts.values())).inputs
    outputs = described.outputs or described.parts["model"].outputs
    fakes[None] = Fake(Part("", frames, outputs), all_pixels)
    return OpticalFlow(described, lambda name: fakes[name]), fakes  # type: ignore[arg-type, return-value]


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
    model = fakes[None]
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
    runs = len(fakes[None].calls)
    top, left, height, width = region

    found = flow.region(first, second, *region)

    np.testing.assert_allclose(found, whole[top : top + height, left : left + width], rtol=0, atol=1e-6)
    if split:
        assert len(fakes[None].calls) == runs  # the joined model ran only for `whole`
        if height * width == 1:
            decoded = [set(row) for call in fakes["decoder"].calls for row in call["queries"].tolist()]
            assert all(len(pixels) == 1 for pixels in decoded)
    if batch == 1 and region == (0, 0, 1, 1):
        assert runs == 6
        ran = len(fakes["encoder"].calls) if split else len(fakes[None].calls) - runs
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
    assert [len(call["frames"]) for call in fakes[None].calls] == [3, 2]
    np.testing.assert_array_equal(*fakes[None].calls[1]["frames"])


def test_frames_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    flow, fakes = open_fake(manifest((16, 24)))
    Image.fromarray(picture(30, 30)).save(tmp_path / "a.png")
    refused: list[tuple[FrameLike, FrameLike, str]] = [
        (picture(30, 30), picture(30, 31), r"the first frame has 30 × 30 pixels, the second frame has 30 × 31"),
        (tmp_path / "a.png", picture(31, 30), r"a\.png has 30 × 30 pixels"),
        (picture(15, 30), picture(15, 30), r"15 × 30 pixels, the model takes 16 × 24 or more"),
        (picture(30, 23), picture(30, 23), r"30 × 23 pixels, the model takes 16 × 24 or more"),
        (picture(30, 30).astype(np.float32), picture(30, 30), "dtype float32"),
        (tmp_path / "absent.png", picture(30, 30), "does not exist"),
    ]
    for first, second, message in refused:
        with pytest.raises(InputError, match=message) as raised:
            flow(first, second)
        assert len(raised.value.hint) > 10
    assert not fakes[None].calls


def test_frames_of_a_directory_go_in_pairs(tmp_path: Path) -> None:
    flow, _ = open_fake(manifest((16, 24)))
    frames = [picture(16, 24, seed) for seed in range(3)]
    for number, frame in zip((2, 10, 9), frames, strict=True):
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    expected = [flow(frames[0], frames[2]), flow(frames[2], frames[1])]

    lazy: list[FrameLike] = [frames[0], tmp_path / "frame9.png", frames[1]]

    for found in (flow.frames(tmp_path), flow.frames([frames[0], frames[2], frames[1]]), flow.frames(iter(lazy))):
        np.testing.assert_array_equal(list(found), expected)


def test_fewer_than_two_frames_are_refused(tmp_path: Path) -> None:
    flow, _ = open_fake(manifest((16, 24)))
    Image.fromarray(picture(16, 24)).save(tmp_path / "a.png")
    for frames in (tmp_path, [picture(16, 24)], []):
        with pytest.raises(InputError, match=r"frames given: [01]$"):
            flow.frames(frames)
    with pytest.raises(InputError, match=r"frames given: 1$"):
        list(flow.frames(iter([picture(16, 24)])))


def test_a_later_frame_of_another_size_is_named() -> None:
    flow, _ = open_fake(manifest((16, 24)))
    flows = flow.frames([picture(16, 24), picture(16, 24), picture(17, 24)])
    next(flows)

    with pytest.raises(InputError, match=r"frame 1 has 16 × 24 pixels, frame 2 has 17 × 24"):
        next(flows)


def test_manifests_of_other_models_are_refused() -> None:
    good = manifest((16, 24), split=True)
    decoder = good.parts["decoder"]
    for wrong in [
        msgspec.structs.replace(good, preprocessing=None),
        msgspec.structs.replace(good, preprocessing=FlowPreprocessing(16, 24, 16)),
        msgspec.structs.replace(good, preprocessing=FlowPreprocessing(16, 25, 4)),
        msgspec.structs.replace(good, parts={"encoder": good.parts["encoder"]}),
        msgspec.structs.replace(
            good, parts={**good.parts, "decoder": msgspec.structs.replace(decoder, inputs=decoder.inputs[:2])}
        ),
        msgspec.structs.replace(
            good, parts={**good.parts, "decoder": msgspec.structs.replace(decoder, num_queries=100)}
        ),
    ]:
        with pytest.raises(BundleError):
            OpticalFlow.check(wrong)


def test_closing_closes_every_part() -> None:
    flow, fakes = open_fake(manifest((16, 24), split=True))
    with flow:
        flow.region(picture(16, 24), picture(16, 24), 0, 0, 2, 2)

    assert fakes["encoder"].closed
    assert fakes["decoder"].closed


# The command


@pytest.fixture
def frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three frames in a directory of their own, and a bundle that `run` opens."""
    monkeypatch.setattr(perceiver_export.runtimes.tasks, "open_task", lambda *_: open_fake(manifest((16, 24)))[0])
    (tmp_path / "in").mkdir()
    paths = [tmp_path / "in" / f"frame{number}.png" for number in (1, 2, 10)]
    for seed, path in enumerate(paths):
        Image.fromarray(picture(20, 30, seed)).save(path)
    return list(map(str, paths))


def options(json: bool = False) -> RunOptions:
    return RunOptions(top=3, device="auto", threads=None, json=json)


def expected_flow(first: str, second: str) -> npt.NDArray[np.float32]:
    return open_fake(manifest((16, 24)))[0](first, second)


@pytest.mark.parametrize("ending", [".flo", ".npy", ".png"])
def test_run_writes_one_flow(frames: list[str], tmp_path: Path, ending: str, capsys: Any) -> None:
    output = tmp_path / f"flow{ending}"
    run_flow.run("bundle", frames[:2], output, options())

    flow = expected_flow(*frames[:2])
    if ending == ".png":
        np.testing.assert_array_equal(read_picture(output), flow_picture(flow))
    else:
        np.testing.assert_array_equal(read_flo(output) if ending == ".flo" else np.load(output), flow)
    shown = capsys.readouterr().out
    assert "frame1.png" in shown
    assert f"{np.hypot(*flow.transpose(2, 0, 1)).max():.2f}" in shown
    assert f"flow{ending}" in shown.replace("\n", "")


def test_run_writes_a_directory_of_flows(frames: list[str], tmp_path: Path, capsys: Any) -> None:
    run_flow.run("bundle", [str(tmp_path / "in")], tmp_path / "out", options(json=True))

    shown = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "frame1.flo", "frame1.png", "frame2.flo", "frame2.png",
    ]  # fmt: skip
    np.testing.assert_array_equal(read_flo(tmp_path / "out" / "frame2.flo"), expected_flow(frames[1], frames[2]))
    assert [pair["frames"] for pair in shown["pairs"]] == [frames[:2], frames[1:]]
    flow = expected_flow(frames[0], frames[1])
    lengths = np.hypot(flow[..., 0], flow[..., 1])
    first = shown["pairs"][0]
    assert (first["height"], first["width"]) == (20, 30)
    assert first["mean"] == pytest.approx(lengths.mean(), rel=1e-5)
    assert first["max"] == pytest.approx(lengths.max(), rel=1e-5)
    assert first["files"] == [str(tmp_path / "out" / name) for name in ("frame1.flo", "frame1.png")]


def test_run_without_output_says_how_to_write(frames: list[str], tmp_path: Path, capsys: Any) -> None:
    run_flow.run("bundle", frames, None, options())

    shown = capsys.readouterr().out
    assert ".flo" in shown
    assert shown.count("frame2.png") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_frames_of_one_name_do_not_overwrite_each_other(frames: list[str], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    same = tmp_path / "other" / "frame1.png"
    Image.open(frames[1]).save(same)

    run_flow.run("bundle", [frames[0], str(same), frames[2]], tmp_path / "out", options(json=True))

    names = sorted(path.name for path in (tmp_path / "out").glob("*.flo"))
    assert names == ["00000_frame1.flo", "00001_frame1.flo"]


def test_frames_of_one_name_are_told_apart(frames: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "other").mkdir()
    same = tmp_path / "other" / "frame1.png"
    Image.fromarray(picture(20, 30, 1)).save(same)
    run_flow.run("bundle", [frames[0], str(same)], None, options())
    shown = capsys.readouterr().out
    assert {"in/frame1.png", "other/frame1.png"} <= set(re.findall(r"[a-z]+/frame1\.png", shown))

    Image.fromarray(picture(20, 31)).save(same)
    with pytest.raises(InputError, match=f"{frames[0]} has 20 × 30 pixels, {same} has 20 × 31"):
        run_flow.run("bundle", [frames[0], str(same)], None, options())


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, InputError])
def test_a_directory_is_whole_or_not_there(
    frames: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, stop: type[BaseException]
) -> None:
    """The second flow never comes: the third frame is of another size, or somebody has had enough."""
    seen = []

    def summarize(*given: Any) -> Any:
        seen.append(list(tmp_path.glob(".*/*.flo")))
        if stop is KeyboardInterrupt:
            raise KeyboardInterrupt
        return run_flow.Motion(("a", "b"), 1, 1, 0, 0, 0, 0, "still", ())

    monkeypatch.setattr(run_flow, "summarize", summarize)
    Image.fromarray(picture(20, 31)).save(frames[2])
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(stop):
        run_flow.run("bundle", frames, tmp_path / "out", options())

    assert [len(files) for files in seen] == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == (["in", "out"] if there else ["in"])
    assert not there or not any((tmp_path / "out").iterdir())


def test_run_refuses_before_it_runs(frames: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceiver_export.runtimes.tasks, "open_task", lambda *_: pytest.fail("the model was loaded"))
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
            run_flow.run("bundle", inputs, output, options())
        assert len(raised.value.hint) > 10


@pytest.mark.parametrize(
    ("x", "y", "direction"),
    [
        (3, 0.2, "right"), (3, 3, "down and right"), (0, 3, "down"), (-3, 3, "down and left"), (-3, 0, "left"),
        (-3, -3, "up and left"), (0, -3, "up"), (3, -3, "up and right"), (0.01, 0, "still"),
        (np.nan, 0, "not a number"),
    ],
)  # fmt: skip
def test_directions_in_words(x: float, y: float, direction: str) -> None:
    flow = np.broadcast_to(np.array([x, y], np.float32), (4, 4, 2))

    assert run_flow.summarize(("a", "b"), flow).direction == direction


def test_a_zoom_has_no_direction() -> None:
    flow = np.stack(np.meshgrid(np.arange(-3, 4), np.arange(-3, 4)), axis=-1).astype(np.float32)

    assert run_flow.summarize(("a", "b"), flow).direction == "mixed"
