# SPDX-License-Identifier: Apache-2.0
"""The task of optical flow and its command, around models that are small functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from perceiver_export.runtimes.errors import BundleError, InputError, RuntimeClosedError
from perceiver_export.runtimes.preprocessing import FlowPreprocessing
from perceiver_export.runtimes.tasks.flow import OpticalFlow
from perceiver_export.runtimes.tasks.image_files import ImageLike
from tests.runtimes.flow_models import manifest, open_fake, picture
from tests.vector_folders import model_folders


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
