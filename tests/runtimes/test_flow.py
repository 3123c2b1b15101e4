# SPDX-License-Identifier: Apache-2.0
"""Optical flow: DeepMind's tiles and stitching, and files that others can read."""

from __future__ import annotations

import json
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from perceiver_export.runtimes.errors import InputError, UsageError
from perceiver_export.runtimes.tasks.flow import Box, grid, stitch, tile_weights, tiles
from perceiver_export.runtimes.tasks.flow_files import color_wheel, flow_image, write_flow
from tests.vector_folders import function_cases, vector_folders

Array = npt.NDArray[Any]


def grid_files() -> list[Path]:
    return [folder / "flow_grids.json" for folder in vector_folders("flow_grids.json")]


def stitched(frame: tuple[int, int], tile: tuple[int, int], corners: Array, flows: Array) -> Array:
    boxes = [Box(int(corner[0]), int(corner[1]), *tile) for corner in corners]
    return stitch(Box(0, 0, *frame), tile, [(box, 1, flow) for box, flow in zip(boxes, flows, strict=True)])


def once(frame: tuple[int, int], tile: tuple[int, int], overlap: int, by_corner: dict[Any, Array]) -> Array:
    """The same from each tile once, counted as often as the grid names it."""
    found = tiles(frame, tile, overlap)
    return stitch(Box(0, 0, *frame), tile, [(box, times, by_corner[box[:2]]) for box, times in found.items()])


# Tiles


@pytest.mark.parametrize("path", grid_files())
def test_grids_of_the_released_model_are_deepminds(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    tile = tuple(document["patch_size"])
    assert document["grids"]
    for case in document["grids"]:
        expected = [tuple(corner) for corner in case["tiles"]]
        assert grid(tuple(case["image"]), tile, case["min_overlap"]) == expected
        once = tiles(tuple(case["image"]), tile, case["min_overlap"])
        lowest, rightmost = (whole - part for whole, part in zip(case["image"], tile, strict=True))
        inside = Counter(corner for corner in expected if corner[0] <= lowest and corner[1] <= rightmost)
        assert {box[:2]: times for box, times in once.items()} == inside


@pytest.mark.parametrize("path", grid_files())
def test_what_deepminds_grid_refuses_is_refused(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["errors"]
    for case in document["errors"]:
        overlap = case.get("min_overlap", 20)
        refused = InputError if overlap < min(document["patch_size"]) else UsageError
        with pytest.raises(refused):
            grid(tuple(case["image"]), tuple(document["patch_size"]), overlap)


@pytest.mark.parametrize(("folder", "name", "case"), function_cases("flow_stitch"))
def test_stitching_is_deepminds(folder: Path, name: str, case: dict[str, Any]) -> None:
    frame, tile, overlap = tuple(case["image_size"]), tuple(case["patch_size"]), case["min_overlap"]
    with np.load(folder / "functions.npz") as vectors:
        corners, flows, expected = (vectors[f"{name}/{key}"] for key in ("grid", "tiles", "out"))
    # What the model gave for a corner; a repeated tile was run twice there, on the same pixels.
    by_corner = {tuple(corner): flow for corner, flow in zip(corners.tolist(), flows, strict=True)}

    every = stitched(frame, tile, corners, flows)

    assert grid(frame, tile, overlap) == list(map(tuple, corners.tolist()))
    np.testing.assert_allclose(every, expected[0], rtol=0, atol=1e-6 * np.abs(expected).max())
    if len(by_corner) == len(corners):
        np.testing.assert_array_equal(once(frame, tile, overlap, by_corner), every)


@pytest.mark.parametrize("frame", [(16, 24), (16, 60), (45, 24)])
def test_running_a_repeated_tile_once_is_exactly_the_same(frame: tuple[int, int]) -> None:
    """A frame as high or as wide as a tile: every tile is repeated equally, and counting it once would do too."""
    tile = (16, 24)
    corners = grid(frame, tile, 4)
    flows = {corner: np.random.default_rng(corner).normal(size=(*tile, 2)).astype(np.float32) for corner in corners}
    assert len(corners) > len(flows)

    twice = stitched(frame, tile, np.array(corners), np.stack([flows[corner] for corner in corners]))
    dropped = stitched(frame, tile, np.array(list(flows)), np.stack(list(flows.values())))

    np.testing.assert_array_equal(once(frame, tile, 4, flows), dropped)
    np.testing.assert_allclose(twice, dropped, rtol=1e-6, atol=1e-6)


def test_a_tile_that_alone_is_repeated_counts_twice() -> None:
    """28 rows, tiles of 16 that overlap by 4: the starts are 0, 12 and 12, and dropping one would not be the same."""
    frame, tile = (28, 24), (16, 24)
    corners = grid(frame, tile, 4)
    assert Counter(corners) == {(0, 0): 2, (12, 0): 4}
    flows = {(0, 0): np.full((*tile, 2), 1.0, np.float32), (12, 0): np.full((*tile, 2), 4.0, np.float32)}

    every = stitched(frame, tile, np.array(corners), np.stack([flows[corner] for corner in corners]))

    np.testing.assert_allclose(once(frame, tile, 4, flows), every, rtol=1e-6)
    # Row 13 is 3rd from the bottom of the first tile and 2nd from the top of the second, which counts twice.
    assert every[13, 12, 0] == pytest.approx((1 * 3 + 4 * 2 * 2) / (3 + 2 * 2))


@pytest.mark.parametrize("overlap", [0, 1, 4, 15])
def test_tiles_cover_frames_of_every_size(overlap: int) -> None:
    """Also of those for which the notebook's grid reaches beyond the frame."""
    beyond = 0
    for size in range(16, 100):
        beyond += any(top + 16 > size for top, _ in grid((size, 16), (16, 16), overlap))
        starts = [box.top for box in tiles((size, 16), (16, 16), overlap)]
        assert starts[0] == 0
        assert starts[-1] == size - 16
        shared = [upper + 16 - lower for upper, lower in pairwise(starts)]
        assert all(overlap <= rows < 16 for rows in shared)
    assert (beyond > 0) == (overlap > 1)


def test_weights_fall_to_one_at_the_border() -> None:
    assert tile_weights((4, 6)).tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 2, 2, 2, 2, 1],
        [1, 2, 2, 2, 2, 1],
        [1, 1, 1, 1, 1, 1],
    ]


# Files


@pytest.fixture
def flow() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(scale=5, size=(5, 7, 2)).astype(np.float32)


def test_flo_is_middleburys_layout(tmp_path: Path) -> None:
    small = np.array([[[1.5, -2.0], [0.25, 3.0], [7.0, 8.0]]], np.float32)
    write_flow(tmp_path / "a.flo", small)

    content = struct.pack("<fii6f", 202021.25, 3, 1, 1.5, -2.0, 0.25, 3.0, 7.0, 8.0)
    assert (tmp_path / "a.flo").read_bytes() == content


def test_files_give_the_flow_back(flow: npt.NDArray[np.float32], tmp_path: Path) -> None:
    for name in ("a.flo", "a.NPY", "a.png"):
        write_flow(tmp_path / name, flow)

    assert (tmp_path / "a.flo").read_bytes()[12:] == flow.tobytes()
    np.testing.assert_array_equal(np.load(tmp_path / "a.NPY"), flow)
    with Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), flow_image(flow))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.NPY", "a.flo", "a.png"]


def test_what_cannot_be_written_is_refused(flow: npt.NDArray[np.float32], tmp_path: Path) -> None:
    (tmp_path / "folder.flo").mkdir()
    for name in ("flow.jpg", "flow", "absent/flow.flo", "folder.flo"):
        with pytest.raises(InputError):
            write_flow(tmp_path / name, flow)
    for wrong in (flow[..., :1], flow[0], flow.astype(np.int32), flow[:0]):
        with pytest.raises(InputError, match="the flow is"):
            write_flow(tmp_path / "wrong.flo", wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.flo"]


def test_the_wheel_has_middleburys_55_hues() -> None:
    wheel = color_wheel()

    assert wheel.shape == (55, 3)
    starts = {0: (255, 0, 0), 15: (255, 255, 0), 21: (0, 255, 0), 25: (0, 255, 255), 36: (0, 0, 255), 49: (255, 0, 255)}
    assert {index: tuple(wheel[index]) for index in starts} == starts
    assert wheel[1].tolist() == [255, 17, 0]  # a fifteenth of the way to yellow
    assert wheel[54].tolist() == [255, 0, 43]  # one sixth before red again


@pytest.mark.parametrize(
    ("right", "down", "color"),
    [(1, 0, (255, 0, 0)), (0, 1, (255, 229, 0)), (-1, 0, (0, 209, 255)), (0, -1, (88, 0, 255))],
)
def test_directions_have_middleburys_colours(right: float, down: float, color: tuple[int, ...]) -> None:
    moving = np.array([[[right, down], [0, 0], [right / 2, down / 2]]], np.float32)
    picture = flow_image(moving)

    assert tuple(picture[0, 0]) == color
    assert tuple(picture[0, 1]) == (255, 255, 255)
    # Half as long, half as far from white.
    np.testing.assert_allclose(picture[0, 2], (np.array(color) + 255) / 2, atol=1)


@pytest.mark.parametrize(
    ("moving", "largest", "picture"),
    [
        # A fixed scale darkens what is longer.
        ([[2, 0], [1, 0], [4, 0]], 2, [[255, 0, 0], [255, 127, 127], [191, 0, 0]]),
        # Unknown flow is black, and does not set the scale.
        ([[1, 0], [np.nan, 0], [2e9, 0], [0, -np.inf]], None, [[255, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        ([[0, 0]] * 3, None, [[255] * 3] * 3),  # nothing moves
    ],
)
def test_the_colours_of_lengths(moving: Any, largest: float | None, picture: Any) -> None:
    assert flow_image(np.array([moving], np.float32), largest).tolist() == [picture]
