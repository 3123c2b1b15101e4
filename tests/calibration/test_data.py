# SPDX-License-Identifier: Apache-2.0
"""DATA in every form that users have, and in forms that must be refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perceiver_export.calibration.data import Sample, open_data
from perceiver_export.runtimes.errors import DataError

LABELS = ("cat", "dog", "T-shirt/top")
PICTURE = np.zeros((4, 4, 3), np.uint8)


def read(spec: str | Path) -> list[Sample]:
    data = open_data(spec, LABELS)
    samples = list(data.samples)
    assert data.count in (None, len(samples))
    return samples


def save_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PICTURE).save(path)


def test_class_folders_by_name_and_by_index(tmp_path: Path) -> None:
    for name in ("dog/b.png", "dog/a.PNG", "cat/c.jpg", "2/d.png", "dog/notes.txt", ".git/e.png"):
        save_picture(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("")

    assert [(sample.name, sample.label) for sample in read(tmp_path)] == [
        ("2/d.png", 2),
        ("cat/c.jpg", 0),
        ("dog/a.PNG", 1),
        ("dog/b.png", 1),
    ]


def test_labels_csv(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "sub" / "b.png")
    (tmp_path / "labels.csv").write_text("file,label\na.png,T-shirt/top\nsub/b.png,1\n")

    assert [(sample.name, sample.label) for sample in read(tmp_path)] == [("a.png", 2), ("sub/b.png", 1)]


def test_pictures_without_labels(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")

    assert [sample.label for sample in read(tmp_path)] == [None]


@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 4, 4, 3)])
def test_npz_with_and_without_labels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "data.npz", image=np.zeros(shape, np.uint8), labels=np.array([0, 1, 2, 0, 1]))

    assert [sample.label for sample in read(tmp_path / "data.npz")] == [0, 1, 2, 0, 1]
    np.savez(tmp_path / "data.npz", image=np.zeros(shape, np.uint8))
    assert [sample.label for sample in read(tmp_path / "data.npz")] == [None] * 5


def test_a_directory_of_shards(tmp_path: Path) -> None:
    for shard in range(3):
        np.savez_compressed(tmp_path / f"{shard}.npz", image=np.zeros((2, 4, 4), np.uint8), labels=np.full(2, shard))

    assert [sample.label for sample in read(tmp_path)] == [0, 0, 1, 1, 2, 2]


def test_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(
        "import numpy\n"
        "def samples():\n"
        "    for label in range(3):\n"
        "        yield {'image': numpy.zeros((4, 4), numpy.uint8), 'label': label}\n"
        "def broken():\n"
        "    return [3]\n"
        "def needs(argument): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    before = list(sys.path)

    assert [sample.label for sample in read("own_data:samples")] == [0, 1, 2]
    assert sys.path == before
    for spec in ("own_data:broken", "own_data:needs", "own_data:absent", "absent:samples", "own_data:"):
        with pytest.raises(DataError):
            read(spec)
    sys.modules.pop("own_data", None)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"picture": np.zeros((1, 4, 4), np.uint8)},
        {"image": np.zeros((1, 4, 4), np.uint8), "mask": np.zeros(1)},
        {"image": np.zeros((1, 4, 4), np.float64)},
        {"image": np.zeros((4, 4), np.uint8)},
        {"image": np.zeros((0, 4, 4), np.uint8)},
        {"image": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)},
        {"image": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)},
        {"image": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 3])},
        {"image": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])},
        {"image": np.array([None])},
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "data.npz", **arrays)

    with pytest.raises(DataError):
        read(tmp_path / "data.npz")


def test_npz_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, image=np.random.default_rng(0).integers(0, 255, (50, 28, 28), dtype=np.uint8))
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for broken in (b"", b"text", content[: len(content) // 2], bytes(flipped)):
        path.write_bytes(broken)
        with pytest.raises(DataError):
            read(path)


@pytest.mark.parametrize(
    "csv",
    [
        "",
        "name,class\na.png,0\n",
        "file,label\nb.png,0\n",
        "file,label\na.png,bird\n",
        "file,label\na.png,3\n",
        "file,label\na.png\n",
    ],
)
def test_labels_csv_that_does_not_fit(tmp_path: Path, csv: str) -> None:
    save_picture(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text(csv)

    with pytest.raises(DataError):
        read(tmp_path)


def test_labels_csv_as_excel_writes_it(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_bytes(b"\xef\xbb\xbffile,label\r\na.png,dog\r\n")
    assert [sample.label for sample in read(tmp_path)] == [1]

    for content in (b"file,label\na.png,\xff\n", "file,label\na.png,²\n".encode(), b"file,label\na.png,--5\n"):
        (tmp_path / "labels.csv").write_bytes(content)
        with pytest.raises(DataError):
            read(tmp_path)


def test_places_without_data(tmp_path: Path) -> None:
    (tmp_path / "bird").mkdir()
    (tmp_path / "text.txt").write_text("")
    for spec in (tmp_path, tmp_path / "absent", tmp_path / "text.txt"):
        with pytest.raises(DataError):
            read(spec)
    save_picture(tmp_path / "bird" / "a.png")
    with pytest.raises(DataError, match="'bird' is not a label"):
        read(tmp_path)
