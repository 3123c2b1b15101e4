# SPDX-License-Identifier: Apache-2.0
"""Point clouds: files of three kinds, the same points from each, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.tasks.points import as_points, into_unit_cube, read_points, subsample

POINTS = [[0.0, 1.0, -2.5], [3.0, 4.0, 5.0], [1e-3, -7.0, 8.25]]

PLY = """ply
format ascii 1.0
comment made by hand
element camera 2
property float fov
element vertex 3
property float nx
property float y
property uchar red
property float x
property float z
element face 1
property list uchar int vertex_indices
end_header
60
70
9 1.0 255 0.0 -2.5
9 4.0 255 3.0 5.0
9 -7.0 255 1e-3 8.25
3 0 1 2
"""


def test_text_with_blanks_commas_comments_and_empty_lines(tmp_path: Path) -> None:
    text = "# x y z\n0 1 -2.5\n\n3.0,4.0,5.0  # the second\r\n  1e-3\t-7 8.25"
    (tmp_path / "a.XYZ").write_text(text, encoding="utf-8-sig")

    assert read_points(tmp_path / "a.XYZ").tolist() == POINTS


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_ply_takes_x_y_z_by_name_and_passes_over_other_elements(ends: str, tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(PLY.replace("\n", ends).encode())

    assert read_points(tmp_path / "a.ply").tolist() == POINTS


def test_headers_of_ply_files_are_read_as_other_writers_write_them(tmp_path: Path) -> None:
    texts = {
        "blank": PLY.replace("format ascii 1.0", "format ascii 1.0 "),
        "comment": PLY.replace("made by hand", "made by hand, before end_header\ncomment end_header"),
        "name": PLY.replace("property uchar red", "property uchar end_header"),
        "comment first": PLY.replace("format ascii 1.0\ncomment made by hand", "comment by hand\nformat ascii 1.0"),
        "blank at the end": PLY.replace("end_header", "end_header "),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.ply").write_text(text, encoding="utf-8")
        assert read_points(tmp_path / f"{name}.ply").tolist() == POINTS, name


@pytest.mark.parametrize("order", ["<", ">"])
def test_binary_ply_gives_the_same_points(order: str, tmp_path: Path) -> None:
    header = PLY.split("end_header")[0] + "end_header\n"
    header = header.replace("ascii", f"binary_{'little' if order == '<' else 'big'}_endian").replace(
        "float x", "double x"
    )
    vertices = np.zeros(
        3, [("nx", f"{order}f4"), ("y", f"{order}f4"), ("red", "u1"), ("x", f"{order}f8"), ("z", f"{order}f4")]
    )
    for axis, column in zip("xyz", np.transpose(POINTS), strict=True):
        vertices[axis] = column
    cameras = np.array([60, 70], f"{order}f4").tobytes()
    (tmp_path / "a.ply").write_bytes(header.encode() + cameras + vertices.tobytes() + b"\x03\0\0\0")

    assert read_points(tmp_path / "a.ply").tolist() == POINTS
    (tmp_path / "a.ply").write_bytes(header.encode() + cameras + vertices.tobytes()[:-1])
    with pytest.raises(InputError, match="2 of 3"):
        read_points(tmp_path / "a.ply")
    lists = header.replace("property float fov", "property list uchar int fov")
    (tmp_path / "a.ply").write_bytes(lists.encode() + cameras + vertices.tobytes())
    with pytest.raises(InputError, match="fov"):
        read_points(tmp_path / "a.ply")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int32, np.uint8])
def test_arrays_of_any_numbers_are_taken(dtype: type[Any], tmp_path: Path) -> None:
    points = np.array([[1, 2, 3], [4, 5, 6]], dtype)
    np.save(tmp_path / "a.npy", points)

    assert read_points(tmp_path / "a.npy").tolist() == points.tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xyz", b"", "no point"),
        ("a.xyz", b"# nothing\n", "no point"),
        ("a.xyz", b"1 2 3\n4 5\n", "row 2"),
        ("a.xyz", b"1 2 3 4\n", "4 numbers"),
        ("a.xyz", b"3\nwater\nO 0 0 0\n", "water"),
        ("a.xyz", b"1 2 3\n1 nan 3\n-inf 2 3\n", "2 of 3 .* point 1"),
        ("a.xyz", b"1 2 \xff\n", "byte 0xff"),
        ("a.ply", b"", "a.ply"),
        ("a.ply", b"solid cube", "not a PLY"),
        ("a.ply", PLY.split("end_header")[0].encode(), "header is truncated"),
        (
            "a.ply",
            PLY.split("end_header")[0].replace("ascii", "binary_big_endian").encode() + b"end_header\n\x00",
            "0 of 3 points",
        ),
        ("a.ply", PLY.replace("vertex 3", "vertex 9").encode(), "4 of 9"),
        ("a.ply", PLY.replace("vertex 3", f"vertex {'9' * 5000}").encode(), "9999"),
        ("a.ply", PLY.replace("camera 2", f"camera {'9' * 5000}").encode(), "9999"),
        ("a.ply", PLY.replace("vertex 3", f"vertex {'9' * 18}").encode(), "4 of"),
        ("a.ply", PLY.replace("end_header", "no end_header").encode(), "header"),
        ("a.ply", PLY.replace("vertex 3", "vertex 0").encode(), "no point"),
        ("a.ply", PLY.replace("vertex 3", "vertices 3").encode(), "no vertices"),
        ("a.ply", PLY.replace("property uchar red", "property uchar x").encode(), "two properties"),
        ("a.ply", PLY.replace("property float z", "property float w").encode(), "no vertices"),
        ("a.ply", PLY.replace("property uchar red", "property list uchar int red").encode(), "no vertices"),
        ("a.ply", PLY.replace("9 4.0 255 3.0 5.0", "9 4.0 255 3.0").encode(), "row 2"),
        ("a.ply", PLY.replace("9 4.0 255 3.0 5.0", "9 4.0 255 NaN 5.0").encode(), "point 1"),
        ("a.npy", b"", "a.npy"),
        ("a.npy", b"\x93NUMPY\x01\x00", "a.npy"),
        ("a.stl", b"solid", "not a readable point cloud"),
    ],
)
def test_what_is_no_point_cloud_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InputError, match=message):
        read_points(tmp_path / name)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 2)),
        np.zeros((4, 6)),
        np.zeros(3),
        np.zeros((0, 3)),
        np.zeros((2, 3), bool),
        np.zeros((2, 3), complex),
        np.full((2, 3), "1"),
        np.array([[1.0, np.nan, 2.0]]),
        np.array([[1.0, np.inf, 2.0]]),
    ],
)
def test_arrays_that_are_no_point_cloud_are_refused(array: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError):
        as_points(array)
    with pytest.raises(InputError):
        read_points(tmp_path / "a.npy")


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 2, "x"]], dtype=object), allow_pickle=True)

    with pytest.raises(InputError, match="is not a"):
        read_points(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["a.npy", "a.xyz", "a.ply"])
def test_paths_that_lead_nowhere_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_points(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError):
        read_points(tmp_path / name)


def test_of_too_many_points_evenly_spaced_ones_are_left() -> None:
    points = np.arange(30, dtype=np.float64).reshape(10, 3)

    assert subsample(points, 4)[:, 0].tolist() == [0, 6, 15, 21]  # points 0, 2, 5 and 7
    assert subsample(points, 10) is points
    assert len(np.unique(subsample(np.arange(300.0).reshape(100, 3), 99)[:, 0])) == 99


@pytest.mark.parametrize("offset", [0.0, 5e6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e150, 1e300])
def test_clouds_come_into_the_unit_cube_wherever_they_were(offset: float, scale: float) -> None:
    cloud = np.random.default_rng(0).normal(size=(50, 3)) * [1, 2, 3] + [1, 2, 3]
    found = into_unit_cube((cloud + offset) * scale)

    assert found.dtype == np.float32
    assert np.abs(found.mean(axis=0, dtype=np.float64)).max() < 1e-6
    assert np.abs(found).max() == pytest.approx(1, abs=1e-6)
    centred = cloud - cloud.mean(axis=0)
    np.testing.assert_allclose(found, centred / np.abs(centred).max(), atol=1e-6)


@pytest.mark.parametrize("count", [1, 7, 10])
def test_one_point_however_often_is_the_origin(count: int) -> None:
    for point in ([0.1, 0.3, 0.7], [0.0, 0.0, 0.0], [1e6, 0.1, -0.3]):
        assert not into_unit_cube(np.tile(point, (count, 1))).any()
