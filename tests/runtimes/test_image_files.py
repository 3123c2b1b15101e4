# SPDX-License-Identifier: Apache-2.0
"""Images: files, Pillow images and arrays become RGB alike, resizing is Pillow's, and what is no image is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image, ImageOps

from perceiver_export.runtimes.errors import InputError, UsageError
from perceiver_export.runtimes.preprocessing import Filter, ImagePreprocessing, Normalize, Rescale, Resize
from perceiver_export.runtimes.tasks.image_files import (
    as_image,
    center_crop,
    list_images,
    read_image,
    resize,
    take_image,
    to_input,
)

FILTERS = get_args(Filter)
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


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)

    assert resize(picture, 28, 28, "bicubic") is picture


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
