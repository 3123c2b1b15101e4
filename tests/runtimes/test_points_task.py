# SPDX-License-Identifier: Apache-2.0
"""Point clouds: files of three kinds, and clouds of any size into a graph of a fixed number of points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes.errors import BundleError, InputError, UsageError
from perceiver_export.runtimes.preprocessing import PointsPreprocessing, VideoPreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks.points import (
    CloudLike,
    PointCloudClassification,
    as_points,
    into_unit_cube,
    read_points,
    subsample,
)
from tests.runtimes.conftest import Ask
from tests.runtimes.models import NumpyEngine, manifest, opened, spec

N = 8
CLOUD = np.random.default_rng(0).normal(size=(20, 3)) + 5
LABELS = ("chair", "table", "lamp")


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


def squares(feeds: Feeds) -> dict[str, Array]:
    """Scores: the mean square of each axis over the points that count."""
    mask = feeds.get("points_mask", np.ones(feeds["points"].shape[:2], np.int32))[..., None]
    return {"logits": (feeds["points"] ** 2 * mask).sum(axis=1) / mask.sum(axis=1).astype(np.float32)}


def task_of(
    masked: bool = True, batch: int | str = 1, labels: tuple[str, ...] = LABELS, **changes: Any
) -> tuple[PointCloudClassification, NumpyEngine]:
    ranges = {"batch": (2, 3)} if batch == "batch" else {}
    mask = (spec("points_mask", batch, N, dtype="int32", **ranges),) * masked
    inputs = changes.get("inputs", (spec("points", batch, N, 3, **ranges), *mask))
    engine = NumpyEngine(squares, inputs, changes.get("outputs", (spec("logits", batch, 3, **ranges),)))
    steps = changes.get("preprocessing", PointsPreprocessing(N))
    described = manifest("point-cloud-classification", engine, steps, labels=labels)
    return opened(PointCloudClassification, described, engine), engine


def test_too_many_points_are_thinned_out_and_normalised() -> None:
    task, engine = task_of()
    found = task(CLOUD, top=3)

    points = into_unit_cube(CLOUD[[0, 2, 5, 7, 10, 12, 15, 17]])
    np.testing.assert_array_equal(engine.calls[0]["points"][0], points)
    assert engine.calls[0]["points_mask"].tolist() == [[1] * N]
    scores = (points**2).mean(axis=0)
    probabilities = np.exp(scores) / np.exp(scores).sum()
    assert [one.index for one in found] == np.argsort(-scores).tolist()
    assert {one.label: one.probability for one in found} == pytest.approx(
        dict(zip(LABELS, probabilities.tolist(), strict=True)), abs=1e-6
    )


def test_too_few_points_are_padded_and_masked() -> None:
    task, engine = task_of()
    task(CLOUD[:5])

    np.testing.assert_array_equal(engine.calls[0]["points"][0, :5], into_unit_cube(CLOUD[:5]))
    assert not engine.calls[0]["points"][0, 5:].any()
    assert engine.calls[0]["points_mask"].tolist() == [[1] * 5 + [0] * 3]
    assert engine.calls[0]["points_mask"].dtype == np.int32


def test_a_model_without_a_mask_needs_all_its_points() -> None:
    task, engine = task_of(masked=False)
    with pytest.raises(InputError, match="has 5 points") as caught:
        task(CLOUD[:5])
    assert f"needs {N}" in caught.value.message
    assert not engine.calls

    task(CLOUD[:N])
    assert engine.calls[0].keys() == {"points"}


@pytest.mark.parametrize("batch", [2, "batch"])
def test_files_and_arrays_in_any_batch_give_the_same(batch: int | str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", CLOUD)
    np.savetxt(tmp_path / "a.xyz", CLOUD, fmt="%.17g")
    task, engine = task_of(batch=batch)
    mixed: list[CloudLike] = [CLOUD[:7], tmp_path / "a.npy", CLOUD, tmp_path / "a.xyz", CLOUD[3:]]
    logits = task.logits(mixed)

    alone, _ = task_of()
    np.testing.assert_array_equal(logits, alone.logits([CLOUD[:7], CLOUD, CLOUD, CLOUD, CLOUD[3:]]))
    assert len(engine.calls) == (3 if batch == 2 else 2)


@pytest.mark.parametrize(
    "cloud", [np.zeros((1, 9, 3)), [[1, 2, 3], [4, 5]], [["1", "2", "3"]], [], None, "nowhere.xyz", Path(__file__)]
)
def test_what_is_no_cloud_is_refused(cloud: Any) -> None:
    task, engine = task_of()
    with pytest.raises(InputError):
        task(cloud)
    with pytest.raises(UsageError):
        task(CLOUD, top=0)
    assert not engine.calls


@pytest.mark.parametrize("clouds", [CLOUD, CLOUD.tolist()], ids=["array", "lists"])
def test_one_cloud_is_one_sample_and_may_be_numbers_in_lists(clouds: Any) -> None:
    task, _ = task_of()

    assert task(clouds) == task(CLOUD)
    assert task.logits(clouds).shape[0] == 1
    both: list[Any] = [clouds, clouds]
    np.testing.assert_array_equal(task.logits(both), np.repeat(task.logits(clouds), 2, axis=0))


@pytest.mark.parametrize("clouds", [[], iter([]), 3], ids=["an empty list", "an empty iterator", "a number"])
def test_no_clouds_and_no_list_of_clouds_are_refused(clouds: Any) -> None:
    task, engine = task_of()
    with pytest.raises(InputError, match="point clouds"):
        task.logits(clouds)
    assert not engine.calls


@pytest.mark.parametrize(
    "changes",
    [
        {"preprocessing": None},
        {"preprocessing": VideoPreprocessing(1, 1, 1, 1, 1)},
        {"preprocessing": PointsPreprocessing(N + 1)},
        {"labels": ("one", "two")},
        {"inputs": (spec("cloud", 1, N, 3),)},
        {"inputs": (spec("points", 1, N, 4),)},
        {"outputs": (spec("one", 1, 3), spec("other", 1, 3))},
    ],
)
def test_manifests_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="2 labels for 3 scores" if "labels" in changes else None):
        task_of(**changes)


def test_run_takes_files_and_directories(ask: Ask, tmp_path: Path) -> None:
    task, _ = task_of()
    np.save(tmp_path / "10.npy", CLOUD)
    np.savetxt(tmp_path / "9.xyz", CLOUD[:4])
    (tmp_path / "notes.txt").write_text("no cloud", encoding="utf-8")
    answers = ask(task, tmp_path, output=tmp_path / "out.json", as_json=True)["answers"]

    assert [answer["input"] for answer in answers] == [str(tmp_path / "9.xyz"), str(tmp_path / "10.npy")]
    assert sorted(one["label"] for one in answers[1]["labels"]) == sorted(LABELS)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["answers"] == answers
    assert ask(task, *[tmp_path / "10.npy"] * 2, as_json=True)["answers"] == [answers[1]] * 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no point clouds"):
        ask(task, tmp_path / "empty")


def test_text_with_blanks_commas_comments_and_empty_lines(tmp_path: Path) -> None:
    text = "# x y z\n0 1 -2.5\n\n3.0,4.0,5.0  # the second\r\n  1e-3\t-7 8.25"
    (tmp_path / "a.XYZ").write_text(text, encoding="utf-8-sig")

    assert read_points(tmp_path / "a.XYZ").tolist() == POINTS


WRITTEN = {
    "x, y and z by name beside other elements": PLY,
    "as Windows ends lines": PLY.replace("\n", "\r\n"),
    "blank": PLY.replace("format ascii 1.0", "format ascii 1.0 "),
    "comment": PLY.replace("made by hand", "made by hand, before end_header\ncomment end_header"),
    "name": PLY.replace("property uchar red", "property uchar end_header"),
    "comment first": PLY.replace("format ascii 1.0\ncomment made by hand", "comment by hand\nformat ascii 1.0"),
    "blank at the end": PLY.replace("end_header", "end_header "),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_ply_files_are_read_as_other_writers_write_them(how: str, tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(WRITTEN[how].encode())

    assert read_points(tmp_path / "a.ply").tolist() == POINTS


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
