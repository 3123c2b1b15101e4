# SPDX-License-Identifier: Apache-2.0
"""Pictures: our numpy resize is Pillow's, and what is no picture is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.pictures import (
    as_picture,
    center_crop,
    picture_files,
    read_picture,
    resize,
    to_input,
)
from perceiver_export.runtimes.preprocessing import ImagePreprocessing

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@pytest.mark.parametrize("resample", sorted(FILTERS))
@pytest.mark.parametrize(("size", "new_size"), [((37, 53), (28, 28)), ((16, 11), (40, 33)), ((256, 300), (224, 224))])
def test_resize_is_pillows_bit_for_bit(resample: str, size: tuple[int, int], new_size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize(new_size[::-1], FILTERS[resample]))

    found = resize(picture, *new_size, resample)

    np.testing.assert_array_equal(expected, found)


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)

    assert resize(picture, 28, 28, "bicubic") is picture


def test_the_crop_is_the_middle_of_the_shorter_side() -> None:
    picture = np.arange(10 * 20, dtype=np.uint8).reshape(10, 20, 1)

    assert center_crop(picture, (0.5, 0.5))[:, :, 0].tolist() == picture[2:7, 7:12, 0].tolist()


def test_deepminds_crop_begins_on_the_other_side_of_the_middle() -> None:
    picture = np.arange(10 * 20, dtype=np.uint8).reshape(10, 20, 1)

    assert center_crop(picture, (0.5, 0.5), round_up=True)[:, :, 0].tolist() == picture[3:8, 8:13, 0].tolist()


def test_normalisation_follows_the_manifest() -> None:
    steps = ImagePreprocessing(2, 2, None, "bicubic", 1 / 255, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    found = to_input(np.full((2, 2), 255, np.uint8), steps)

    assert found.dtype == np.float32
    assert found[:, 0, 0].tolist() == pytest.approx([1.0, 3.0, 1.0])


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (4, 4, 3), (4, 4, 4)])
def test_grey_colour_and_alpha_become_three_channels(shape: tuple[int, ...]) -> None:
    assert as_picture(np.zeros(shape, np.uint8)).shape == (4, 4, 3)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4), np.uint8)],
)
def test_arrays_that_are_no_pictures_are_refused(array: Any) -> None:
    with pytest.raises(InputError):
        as_picture(array)


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
            read_picture(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read_picture(tmp_path / "absent.png")
    with pytest.raises(InputError):
        read_picture(tmp_path)

    assert read_picture(good).shape == (64, 64, 3)


def test_a_turned_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)

    assert read_picture(tmp_path / "turned.png").shape == (4, 3, 3)


def test_a_picture_of_sixteen_bits_is_refused_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "deep.png")

    with pytest.raises(InputError, match="8 bits"):
        read_picture(tmp_path / "deep.png")


def test_files_of_a_directory_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("frame10.png", "frame2.PNG", "frame1.jpg", "notes.txt", "a.png", "7.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()

    names = [path.name for path in picture_files(tmp_path)]

    assert names == ["7.png", "a.png", "frame1.jpg", "frame2.PNG", "frame10.png"]


def test_a_directory_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no pictures"):
        picture_files(tmp_path)
    for wrong in ("notes.txt", "absent"):
        with pytest.raises(InputError, match="not a directory"):
            picture_files(tmp_path / wrong)
