# SPDX-License-Identifier: Apache-2.0
"""Images: files, Pillow images and arrays become RGB alike, resizing is Pillow's, and what is no image is refused.

DeepMind's images and video frames: our numpy resize gives OpenCV's pixels, within 1 grey level.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from perceiver_export.runtimes.errors import InputError, UsageError
from perceiver_export.runtimes.preprocessing import (
    CenterCropShare,
    Filter,
    ImagePreprocessing,
    Normalize,
    Rescale,
    Resize,
)
from perceiver_export.runtimes.tasks.image_files import (
    as_image,
    center_crop,
    list_images,
    read_image,
    resize,
    resize_cubic,
    resize_linear,
    take_image,
    to_input,
)
from perceiver_export.runtimes.tasks.images import prepare_frames
from tests.vector_folders import function_cases

FILTERS = get_args(Filter)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = 224 / 256  # DeepMind's
MODES = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")


def test_resize_is_pillows_for_300_random_shapes_and_modes() -> None:
    draw = np.random.default_rng(0)
    for number in range(300):
        height, width, new_height, new_width = (int(side) for side in draw.integers(1, 120, 4))
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(MODES[number % len(MODES)])
        resample = FILTERS[number % 6]
        expected = image.convert("RGB").resize((new_width, new_height), Image.Resampling[resample.upper()])

        steps = ImagePreprocessing(new_height, new_width, (Resize(new_height, new_width, resample),))
        found = to_input(take_image(image), steps)  # also of modes that no file has

        np.testing.assert_array_equal(found, np.asarray(expected, np.float32).transpose(2, 0, 1))


def test_the_crop_is_the_middle() -> None:
    picture = np.arange(10 * 20, dtype=np.uint8).reshape(10, 20, 1)

    assert center_crop(picture, 5, 5)[:, :, 0].tolist() == picture[2:7, 7:12, 0].tolist()
    assert center_crop(picture, 5, 5, round_up=True)[:, :, 0].tolist() == picture[3:8, 8:13, 0].tolist()


def test_normalisation_follows_the_manifest() -> None:
    steps = ImagePreprocessing(2, 2, (Rescale(1 / 255), Normalize((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))))
    found = to_input(np.full((2, 2), 255, np.uint8), steps)

    assert found.dtype == np.float32
    assert found[:, 0, 0].tolist() == pytest.approx([1.0, 3.0, 1.0])


FILES = {**dict.fromkeys(("1", "L", "P", "LA", "RGB", "RGBA"), "png"), "CMYK": "jpg"}


@pytest.mark.parametrize(("mode", "suffix"), FILES.items())
@pytest.mark.parametrize("orientation", [None, 3, 6])
def test_a_pillow_image_is_taken_as_its_file_is(
    tmp_path: Path, mode: str, suffix: str, orientation: int | None
) -> None:
    path = tmp_path / f"image.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    with Image.open(path) as image:
        assert image.mode == mode
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        from_pillow = take_image(image)

    np.testing.assert_array_equal(take_image(path), expected)
    np.testing.assert_array_equal(from_pillow, expected)
    assert expected.shape == ((17, 12, 3) if orientation == 6 else (12, 17, 3))


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_an_image_of_more_than_eight_bits_is_refused_and_not_clipped(tmp_path: Path, kind: Any) -> None:
    image = Image.fromarray(np.full((4, 4), 4000, kind))
    image.save(tmp_path / "deep.tiff")

    for given in (image, tmp_path / "deep.tiff"):
        with pytest.raises(InputError, match="8 bits"):
            take_image(given)


def test_bgr_is_for_arrays_only(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")

    np.testing.assert_array_equal(take_image(np.ascontiguousarray(pixels[:, :, ::-1]), "bgr"), pixels)
    np.testing.assert_array_equal(take_image(np.dstack([pixels[:, :, ::-1], pixels[:, :, :1]]), "bgr"), pixels)
    for given in (image, tmp_path / "image.png"):
        np.testing.assert_array_equal(take_image(given, "bgr"), pixels)
    with pytest.raises(UsageError):
        take_image(pixels, "hsv")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (4, 4, 3), (4, 4, 4)])
def test_grey_colour_and_alpha_become_three_channels(shape: tuple[int, ...]) -> None:
    assert as_image(np.zeros(shape, np.uint8)).shape == (4, 4, 3)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4), np.uint8)],
)
def test_arrays_that_are_no_pictures_are_refused(array: Any) -> None:
    with pytest.raises(InputError):
        as_image(array)


def test_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(good)
    content = good.read_bytes()
    for name, broken in {
        "text.png": b"not a picture",
        "empty.png": b"",
        "cut.png": content[: len(content) // 2],
        "flipped.png": content[:20] + bytes([content[20] ^ 255]) + content[21:],
    }.items():
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(InputError):
            read_image(tmp_path / name)
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(InputError):
        take_image(image)
    with pytest.raises(InputError, match="does not exist"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(InputError):
        read_image(tmp_path)

    assert read_image(good).shape == (64, 64, 3)


def test_files_of_a_directory_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("frame10.png", "frame2.PNG", "frame1.jpg", "notes.txt", "a.png", "7.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()

    names = [path.name for path in list_images(tmp_path)]

    assert names == ["7.png", "a.png", "frame1.jpg", "frame2.PNG", "frame10.png"]


def test_a_directory_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="contains no images"):
        list_images(tmp_path)
    for wrong in ("notes.txt", "absent"):
        with pytest.raises(InputError, match="not a readable directory"):
            list_images(tmp_path / wrong)


def cases(group: str) -> list[Any]:
    return [pytest.param(folder, name, id=name) for folder, name, _ in function_cases(group)]


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
def test_the_same_size_changes_nothing_and_one_pixel_fills_any(function: Any) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    pixel = np.array([[[0, 128, 255]]], np.uint8)

    np.testing.assert_array_equal(function(picture, 11, 13), picture)
    assert resize(picture, 11, 13, "bicubic") is picture
    np.testing.assert_array_equal(function(pixel, 3, 5), np.broadcast_to(pixel, (3, 5, 3)))


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
