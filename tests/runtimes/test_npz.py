# SPDX-License-Identifier: Apache-2.0
"""Archives of arrays that nobody vouches for."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes.errors import DataError, InputError
from perceiver_export.runtimes.npz import Npz, read_npz, write_npz

ARRAYS: dict[str, Any] = {
    "image": np.arange(24, dtype=np.uint8).reshape(4, 2, 3),
    "by_columns": np.asfortranarray(np.arange(8, dtype=np.float32).reshape(4, 2)),
    "labels": np.array(["a", "bb", "c", "d"]),
    "big_endian": np.arange(4, dtype=">i4"),
    "flags": np.array([True, False, True, True]),
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    np.savez_compressed(tmp_path / "a.npz", **ARRAYS)
    return tmp_path / "a.npz"


def test_a_number_is_no_array_of_one(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", {"number": np.array(3.0)})
    assert read_npz(tmp_path / "a.npz")["number"].shape == ()


def test_arrays_come_back_whole_and_by_rows(archive: Path) -> None:
    whole = read_npz(archive)
    with Npz(archive) as opened:
        rows = list(opened.rows())

    assert whole.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(whole[name], array)
        assert whole[name].dtype == array.dtype
        for index, row in rows:
            np.testing.assert_array_equal(row[name], array[index])


def test_a_few_bytes_do_not_become_many(tmp_path: Path) -> None:
    """64 MiB of zeros in less than 0.1 MiB: rows are read one at a time, and the whole is refused from its header."""
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as file, file.open("x.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (64, 1 << 20)})
        for _ in range(64):
            member.write(bytes(1 << 20))

    tracemalloc.start()
    with Npz(tmp_path / "bomb.npz", limit=1 << 25) as opened:
        rows = sum(1 for _ in opened.rows())
        with pytest.raises(InputError, match=r"0\.1 GiB"):
            opened.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert rows == 64
    assert peak < 16 << 20


def damaged(content: bytes, name: str = "x.npy", compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr(name, content)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


CUT, FLIPPED = npy(np.zeros(100))[:-8], bytearray(damaged(npy(np.arange(1000)), "x.npy", zipfile.ZIP_DEFLATED))
FLIPPED[60] ^= 255
BAD = {
    "empty": b"",
    "flipped": bytes(FLIPPED),
    "no zip": b"PK\x03\x04 but no more",
    "member that is no array": damaged(b"text", "readme.txt"),
    "objects": damaged(npy(np.array([{}, None]))),
    "records": damaged(npy(np.zeros(2, [("a", "f4")]))),
    "dates": damaged(npy(np.zeros(2, "M8[s]"))),
    "cut": damaged(CUT),
    "an .npy": npy(np.zeros(3)),
    "negative shape": damaged(npy(np.zeros(3)).replace(b"(3,)", b"(-3,)")),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_archive_is_one_error(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(BAD[kind])
    with pytest.raises(DataError) as caught:
        read_npz(tmp_path / "x.npz", DataError)
    assert "x.npz" in caught.value.message


def test_a_missing_archive_and_a_directory_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_npz(tmp_path / "none.npz")
    with pytest.raises(InputError):
        read_npz(tmp_path)
