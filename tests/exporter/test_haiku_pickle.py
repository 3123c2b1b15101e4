# SPDX-License-Identifier: Apache-2.0
"""Haiku's pickles: every number as it was saved, or an error that says what the file is."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from perceiver_export.exporter.checkpoints.haiku_pickle import read_haiku
from perceiver_export.runtimes.errors import CheckpointError

from .haiku_writer import dumps, flat_mappings, modules, write

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
MODELS = sorted(path.parent.name for path in VECTORS.glob("*/checkpoint.pickle"))
PROTOCOLS = (2, 3, 4, 5)


def as_numpy_1(content: bytes) -> bytes:
    """The same pickle with numpy 1's module paths. Its one frame is dropped: frames are optional and count bytes."""
    if content[2:3] == pickle.FRAME:
        content = content[:2] + content[11:]
    for old in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        new = old.replace(b"_core", b"core")
        content = content.replace(b"c" + old, b"c" + new)
        content = content.replace(b"\x8c%c%b" % (len(old), old), b"\x8c%c%b" % (len(new), new))
    assert b"_core" not in content
    return content


def arrays() -> dict[str, npt.NDArray[Any]]:
    """One of each layout and dtype that a checkpoint may hold."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(2, 3, 4, 5))
    return {
        "c_order": values.astype(np.float32),
        "fortran_order": np.asfortranarray(values.astype(np.float32)),
        "transposed": values.astype(np.float32).transpose(2, 0, 3, 1),
        "strided": values.astype(np.float32)[::2, :, 1::2],
        "big_endian": values.astype(">f4"),
        "double": values,
        "no_axes": np.array(1.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "counter": np.array([3, 4], np.int32),
        "mask": np.array([True, False]),
    }


def assert_same(expected: Mapping[str, npt.NDArray[Any]], found: Mapping[str, npt.NDArray[Any]]) -> None:
    assert sorted(expected) == sorted(found)
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], strict=True)
        assert found[name].flags.writeable


# What is read


@pytest.mark.parametrize("model", MODELS)
def test_reference_checkpoints_hold_the_reference_parameters(model: str) -> None:
    folder = VECTORS / model
    state = folder / "state.npz"

    found = read_haiku(folder / "checkpoint.pickle")

    assert_same({**np.load(folder / "params.npz"), **(np.load(state) if state.exists() else {})}, found)


def test_there_are_six_reference_checkpoints() -> None:
    assert len(MODELS) == 6


@pytest.mark.parametrize("numpy_1", [False, True], ids=["numpy2", "numpy1"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_and_layout_gives_the_same_numbers(tmp_path: Path, protocol: int, numpy_1: bool) -> None:
    content = dumps(flat_mappings({"net/~/linear": arrays()}), protocol=protocol)
    path = write(tmp_path / "p.pickle", as_numpy_1(content) if numpy_1 else content)

    found = read_haiku(path)

    expected = {f"net/~/linear/{name}": array for name, array in arrays().items()}
    expected["net/~/linear/big_endian"] = expected["net/~/linear/big_endian"].astype(np.float32)
    assert_same(expected, found)


W, SHARED = np.ones(2, np.float32), np.arange(3, dtype=np.float32)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("content", "params", "state"),
    [
        (
            {"params": flat_mappings({"a": {"w": W}}), "state": flat_mappings({"b/~/mean_ema": {"average": SHARED}})},
            {"a/w": W},
            {"b/~/mean_ema/average": SHARED},
        ),
        ({"params": {"w": W}}, {"params/w": W}, {}),  # a module that is called params, in a plain dict
        ({"a": {"w": np.array([0.5, 65504], np.float16)}}, {"a/w": np.array([0.5, 65504], np.float16)}, {}),
        ({"a": {"counter": np.int32(7)}}, {"a/counter": np.array(7, np.int32)}, {}),
        ({"a": {"w": SHARED}, "b": {"w": SHARED}}, {"a/w": SHARED, "b/w": SHARED}, {}),
    ],
    ids=["params and state", "plain dict", "half precision", "scalar", "one array under two names"],
)
def test_what_a_checkpoint_may_be(content: Any, params: Any, state: Any, protocol: int, tmp_path: Path) -> None:
    found = read_haiku(write(tmp_path / "p.pickle", content, protocol))

    assert_same({**params, **state}, found)


def _reconstruct_array(function: Any, args: Any, state: Any, flags: Any) -> Any:
    raise NotImplementedError


_reconstruct_array.__module__ = "jax._src.array"


class JaxArray:
    """Pickled as jax 0.4 to 0.10 pickle theirs."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self.values = values

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_array, (*self.values.__reduce__(), {"weak_type": False, "named_shape": {}})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_jax(tmp_path: Path, protocol: int) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    with modules(_reconstruct_array.__module__, _reconstruct_array=_reconstruct_array):
        path = write(tmp_path / "p.pickle", {"a": {"w": JaxArray(values)}}, protocol)

    found = read_haiku(path)

    assert_same({"a/w": values}, found)


# What is damaged, or something else


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.3, 0.9, 0.99999])
@pytest.mark.parametrize("model", MODELS)
def test_truncated_checkpoints(tmp_path: Path, model: str, share: float) -> None:
    content = (VECTORS / model / "checkpoint.pickle").read_bytes()

    with pytest.raises(CheckpointError, match="is not a readable pickle"):
        read_haiku(write(tmp_path / "p.pickle", content[: max(1, int(share * len(content)))]))


def test_every_cut_of_a_small_checkpoint(tmp_path: Path) -> None:
    content = pickle.dumps({"a": {"w": np.ones(2, np.float32)}}, 4)
    for length in range(1, len(content)):
        with pytest.raises(CheckpointError, match="is not a readable pickle"):
            read_haiku(write(tmp_path / "p.pickle", content[:length]))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_changed_bytes_give_a_checkpoint_or_our_error(tmp_path: Path, protocol: int) -> None:
    content = dumps(flat_mappings({"a": {"w": np.ones(2, np.float32), "b": np.zeros(1)}}), protocol)
    generator, refused = random.Random(protocol), 0
    for _ in range(500):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 5))):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        try:
            assert isinstance(read_haiku(write(tmp_path / "p.pickle", bytes(changed))), dict)
        except CheckpointError:
            refused += 1

    assert refused > 250  # most changes break it; those of a number or a name do not


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(zipfile.ZipInfo("data.pkl"), b"")
    return content.getvalue()


NO_PICKLES = (b"<html>not found</html>", b"{}", b"\x00" * 64, b"\x89HDF\r\n\x1a\n", b"text\n")


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"", "is empty", ""),
        ("missing.pickle", "does not exist", ""),
        (".", "cannot be read", ""),
        (gzip.compress((VECTORS / "language" / "checkpoint.pickle").read_bytes(), mtime=0), "is a gzip file", "unpack"),
        (zipped(), "is a zip file", ""),
        *((content, "is not a readable pickle", "") for content in NO_PICKLES),
        (b"\x80\x02cml_dtypes\nbfloat16\n.", r"names the class ml_dtypes\.bfloat16", "numpy.float32"),
    ],
)
def test_files_that_are_no_such_pickles(content: bytes | str, message: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / content if isinstance(content, str) else write(tmp_path / "p.pickle", content)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_haiku(path)
    assert hint in raised.value.hint


ITSELF: dict[str, object] = {}
ITSELF["a"] = ITSELF


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([np.ones(2)], "no mapping of parameters"),
        ({}, "no mapping of parameters"),
        (np.ones(2), "no mapping of parameters"),
        ({"w": np.ones(2)}, "not a mapping of modules"),
        ({"a": {"b": {"w": np.ones(2)}}}, "'a/b' is not one array"),
        ({"a": {"w": [1.0, 2.0]}}, "'a/w' is not one array"),
        ({"a": {"w": 1.0}}, "'a/w' is not one array"),
        ({b"a": {"w": np.ones(2)}}, "not a mapping of modules"),
        ({"a": {0: np.ones(2)}}, "not a mapping of modules"),
        ({"a/b": {"c": np.ones(2)}, "a": {"b/c": np.ones(2)}}, "'a/b/c' is not one array"),
        ({"params": {"a": {"w": np.ones(2)}}, "state": {}, "opt_state": 1}, "opt_state beside params and state"),
        ({"params": {"a": {"w": np.ones(2)}}, "state": [1]}, "not a mapping of modules"),
        (ITSELF, "'a/a' is not one array"),
    ],
)
def test_pickles_of_other_things(tmp_path: Path, tree: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_haiku(write(tmp_path / "p.pickle", tree))
