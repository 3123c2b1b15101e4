# SPDX-License-Identifier: Apache-2.0
"""DeepMind's pictures and video frames: our numpy resize gives OpenCV's pixels, within 1 grey level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.preprocessing import CenterCropShare, ImagePreprocessing, Normalize, Rescale, Resize
from perceiver_export.runtimes.tasks.image_files import center_crop, resize, resize_cubic, resize_linear, to_input
from perceiver_export.runtimes.tasks.images import prepare_frames
from tests.vector_folders import vector_folders

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = 224 / 256


def cases(group: str) -> list[Any]:
    found = []
    for folder in vector_folders("cases.json"):
        names = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]
        found += [pytest.param(folder, name, id=name) for name in names if name.split("/")[0] == group]
    assert found
    return found


def arrays(folder: Path, name: str) -> dict[str, npt.NDArray[Any]]:
    with np.load(folder / "functions.npz") as vectors:
        return {key[len(name) + 1 :]: vectors[key] for key in vectors.files if key.startswith(f"{name}/")}


def differences(found: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    assert found.shape == expected.shape
    off: npt.NDArray[np.int16] = np.abs(found.astype(np.int16) - expected)
    return off


@pytest.mark.parametrize(("folder", "name"), cases("imagenet_picture"))
def test_crop_and_resize_are_deepminds(folder: Path, name: str) -> None:
    vectors = arrays(folder, name)
    (key,) = (key for key in vectors if key.startswith("resized"))
    rows = int(CROP * min(vectors["in"].shape[:2]))
    cropped = np.asarray(center_crop(vectors["in"], rows, rows, round_up=True), np.uint8)
    if key == "resized":
        height, width = vectors[key].shape[:2]
        found = resize(cropped, height, width, "opencv-bicubic")
    else:  # of a whole 224 × 224, these rows are stored
        side = vectors[key].shape[1]
        found = resize(cropped, side, side, "opencv-bicubic")[[int(row) for row in key.split("_")[2:]]]

    off = differences(found, vectors[key])

    assert off.max() <= 1
    assert np.count_nonzero(off) <= 0.005 * off.size


@pytest.mark.parametrize(("folder", "name"), cases("imagenet_picture"))
def test_the_input_is_deepminds(folder: Path, name: str) -> None:
    vectors = arrays(folder, name)
    if "normalized" not in vectors:
        assert "full_224" in name
        return
    expected = vectors["normalized"].transpose(2, 0, 1)
    height, width = expected.shape[1:]
    crop, resized = CenterCropShare(CROP, CROP, round_up=True), Resize(height, width, "opencv-bicubic")
    steps = ImagePreprocessing(height, width, (crop, resized, Rescale(1 / 255), Normalize(MEAN, STD)))

    grey_levels = np.abs(to_input(vectors["in"], steps) - expected) * (np.array(STD)[:, None, None] * 255)

    # Whole grey levels where the resize differs, float32's rounding elsewhere.
    np.testing.assert_allclose(grey_levels, np.minimum(np.rint(grey_levels), 1), atol=1e-4)
    assert np.count_nonzero(grey_levels > 0.5) <= 0.005 * grey_levels.size


def test_the_crop_goes_with_the_resize() -> None:
    picture = np.zeros((9, 8, 3), np.uint8)  # 2 rows are left over and 1 column: 7 × 7 from (1, 1), not from (1, 0)
    picture[:, 0] = 255

    for round_up, most in ((True, 0), (False, 255)):
        steps = ImagePreprocessing(7, 7, (CenterCropShare(CROP, CROP, round_up), Resize(7, 7, "opencv-bicubic")))
        assert to_input(picture, steps).max() == most


@pytest.mark.parametrize(("folder", "name"), cases("video_frames"))
def test_video_frames_are_deepminds(folder: Path, name: str) -> None:
    vectors = arrays(folder, name)
    expected = vectors["out_rgb"]
    frames = list(vectors["in_bgr"][: len(expected), :, :, ::-1])

    found = prepare_frames(frames, expected.shape[1], expected.shape[2])

    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("size", "square"), [((4, 7), (0, 1)), ((5, 8), (0, 2)), ((8, 5), (2, 0)), ((6, 9), (0, 1))])
def test_the_square_of_a_frame_begins_where_deepmind_begins_it(size: tuple[int, int], square: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    (top, left), side = square, min(size)

    found = prepare_frames([frame], side, side)

    # side // 2 is taken from the middle, which is rounded down too.
    np.testing.assert_array_equal(np.rint(found[0] * 255), frame[top : top + side, left : left + side])


def test_frames_of_different_sizes_become_one_array() -> None:
    frames = [np.full((6, 9, 3), 51, np.uint8), np.full((20, 4), 255, np.uint8)]

    found = prepare_frames(frames, 5, 7)

    assert found.shape == (2, 5, 7, 3)
    np.testing.assert_array_equal(found[0], np.float32(0.2))
    np.testing.assert_array_equal(found[1], 1)


@pytest.mark.parametrize("frames", [[], [np.zeros((4, 4, 3), np.float32)], [np.zeros((4, 4, 2), np.uint8)]])
def test_what_is_no_frame_is_refused(frames: list[npt.NDArray[Any]]) -> None:
    with pytest.raises(InputError):
        prepare_frames(frames, 2, 2)


@pytest.mark.parametrize("function", [resize_cubic, resize_linear])
def test_the_same_size_changes_nothing(function: Any) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)

    np.testing.assert_array_equal(function(picture, 11, 13), picture)


@pytest.mark.parametrize("function", [resize_cubic, resize_linear])
def test_one_pixel_fills_any_size(function: Any) -> None:
    picture = np.array([[[0, 128, 255]]], np.uint8)

    np.testing.assert_array_equal(function(picture, 3, 5), np.broadcast_to(picture, (3, 5, 3)))


def test_linear_drops_bits_downwards_and_not_across() -> None:
    """What OpenCV 5.0 gave."""
    line = np.array([3, 251, 17, 90], np.uint8)

    assert resize_linear(line[None, :, None], 1, 7).ravel().tolist() == [3, 92, 233, 134, 22, 64, 90]
    assert resize_linear(line[:, None, None], 7, 1).ravel().tolist() == [3, 91, 233, 134, 22, 64, 90]


def test_halving_takes_the_mean_of_four_pixels() -> None:
    picture = np.array([[[10], [20], [0], [0]], [[30], [41], [0], [1]]], np.uint8)

    assert resize_linear(picture, 1, 2)[:, :, 0].tolist() == [[25, 0]]


def test_cubic_overshoots_at_an_edge_and_is_clipped() -> None:
    edge = np.array([0, 0, 0, 100, 100, 100], np.uint8)[None, :, None]

    # By hand: a quarter of a pixel on, the weights of a = −0.75 are −0.105, 0.879, 0.262 and −0.035.
    assert resize_cubic(edge, 1, 12)[0, :, 0].tolist() == [0, 0, 0, 0, 0, 23, 77, 111, 104, 100, 100, 100]
