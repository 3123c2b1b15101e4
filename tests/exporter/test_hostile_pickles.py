# SPDX-License-Identifier: Apache-2.0
"""Pickles that would run code, or make Python do what no checkpoint needs: refused, and nothing executed."""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from perceiver_export.exporter.checkpoints.haiku_pickle import read_haiku
from perceiver_export.runtimes.errors import CheckpointError

from .haiku_writer import FlatMapping, flat_mappings, modules, write

PROTOCOLS = (2, 3, 4, 5)
EXTENSION = 0x70000001  # in the range that copyreg leaves to whoever wants it


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


class Touch:
    """Makes a file when anything of it is run."""

    def __init__(self, path: str) -> None:
        Path(path).touch()


def payloads(sentinel: Path) -> dict[str, object]:
    """Pickles, or objects to pickle, that make ``sentinel`` when Python reads them."""
    code = f"open({str(sentinel)!r}, 'w').close()"
    system = Call(os.system, f"touch {sentinel}")
    module, touch = os.system.__module__.encode(), f"touch {sentinel}".encode()
    weights = {"w": np.ones(2, np.float32)}
    return {
        "os.system": system,
        "os.system in a bundle": {"a": {"w": system}},
        "os.system in a FlatMapping": flat_mappings({"a": {"w": system}}),
        "os.system beside good arrays": {"params": {"a": weights}, "state": {"b": {"average": system}}},
        "os.system in a key": {Call(str, system): weights},
        "eval": Call(builtins.eval, f"({code}, 1)[1]"),
        "exec": Call(builtins.exec, code),
        "getattr": Call(builtins.getattr, Call(builtins.__import__, "pathlib"), Call(str, system)),
        "numpy.savetxt": Call(np.savetxt, str(sentinel), [1.0]),
        "a class of ours": Call(Touch, str(sentinel)),
        "object array": {"a": {"w": np.array([system, 1.0], dtype=object)}},
        "object array in a FlatMapping": flat_mappings({"a": {"w": np.array([system], dtype=object)}}),
        "copyreg._reconstructor": [Call(vars(copyreg)["_reconstructor"], set, set, [1]), system],
        # The name of the function is put into the memo, and called long after.
        "memo": b"\x80\x04\x8c%c%b\x94\x8c\x06system\x94]\x94h\x00h\x01\x93\x94(h\x03\x8c%c%b\x85Rl."
        % (len(module), module, len(touch), touch),
        "memo of a global": b"c%b\nsystem\np7\n0}g7\n(V%b\ntR." % (module, touch),
        "INST": b"(V%b\ni%b\nsystem\n." % (touch, module),
        "OBJ": b"(c%b\nsystem\nV%b\no." % (module, touch),
        "NEWOBJ": b"\x80\x02c%b\nTouch\nV%b\n\x85R." % (__name__.encode(), str(sentinel).encode()),
        "good start": pickle.dumps({"a": weights}, 4)[:-1] + b"c%b\nsystem\n(V%b\ntR." % (module, touch),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", sorted(payloads(Path("x"))))
def test_hostile_pickles_are_refused_and_not_run(tmp_path: Path, name: str, protocol: int) -> None:
    sentinel = tmp_path / "sentinel"
    path = write(tmp_path / "p.pickle", payloads(sentinel)[name], protocol)

    with pytest.raises(CheckpointError, match=r"(names the class|dtype is O8).*; refused, nothing was exec") as raised:
        read_haiku(path)

    assert not sentinel.exists()
    assert "do not trust" in raised.value.hint
    with modules(FlatMapping.__module__, FlatMapping=FlatMapping), contextlib.suppress(Exception):
        pickle.loads(path.read_bytes())  # some break after they ran
    assert sentinel.exists(), "this pickle would not have done anything: the test shows nothing"


def test_the_class_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "p.pickle", Call(os.system, "true"))

    with pytest.raises(CheckpointError, match=rf"names the class {os.system.__module__}\.system"):
        read_haiku(path)


def test_names_cannot_paint_the_terminal(tmp_path: Path) -> None:
    name = "\x1b[2J" + "x" * 1000
    content = b"\x80\x04\x8c\x01a" + pickle.BINUNICODE + len(name).to_bytes(4, "little") + name.encode() + b"\x93."

    with pytest.raises(CheckpointError) as raised:
        read_haiku(write(tmp_path / "p.pickle", content))

    assert "\x1b" not in raised.value.message
    assert len(raised.value.message) < 500


def test_the_extension_registry_is_not_asked(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    content = b"\x80\x02" + pickle.EXT4 + EXTENSION.to_bytes(4, "little") + b"(V%b\ntR." % str(sentinel).encode()
    path = write(tmp_path / "p.pickle", content)
    copyreg.add_extension(__name__, "Touch", EXTENSION)
    try:
        pickle.loads(content)  # runs it, and puts the class into a cache that find_class never sees
        assert sentinel.exists()
        sentinel.unlink()
        with pytest.raises(CheckpointError, match="objects outside the file; refused"):
            read_haiku(path)
        assert not sentinel.exists()
    finally:
        copyreg.remove_extension(__name__, "Touch", EXTENSION)


@pytest.mark.parametrize("protocol", [0, *PROTOCOLS])
def test_persistent_ids_are_refused(tmp_path: Path, protocol: int) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object, /) -> str | None:
            return "elsewhere" if isinstance(obj, np.ndarray) else None

    stream = io.BytesIO()
    Pickler(stream, protocol).dump({"a": {"w": np.ones(2)}})

    with pytest.raises(CheckpointError, match="objects outside the file; refused"):
        read_haiku(write(tmp_path / "p.pickle", stream.getvalue()))


@pytest.mark.parametrize("target", ["haiku._src.data_structures\nFlatMapping", "numpy\nndarray", "numpy\ndtype"])
def test_a_file_cannot_change_what_reads_the_next(tmp_path: Path, target: str) -> None:
    for name in ("_function", "__call__", "__init__", "__setstate__"):
        content = b"\x80\x02c%b\nN}V%b\ncnumpy\nndarray\ns\x86b." % (target.encode(), name.encode())
        with pytest.raises(CheckpointError, match="changes a function; refused"):
            read_haiku(write(tmp_path / "p.pickle", content))

    good = read_haiku(write(tmp_path / "good.pickle", {"a": {"w": np.ones(2, np.float32)}}))
    np.testing.assert_array_equal(good["a/w"], np.ones(2, np.float32), strict=True)


def test_a_memo_of_gigabytes_is_refused(tmp_path: Path) -> None:
    content = b"\x80\x03}" + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f."

    with pytest.raises(CheckpointError, match="a memo of 2147483647 entries"):
        read_haiku(write(tmp_path / "p.pickle", content))


@pytest.mark.parametrize(
    "array",
    [
        np.array([1, "a", None], dtype=object),
        np.zeros(2, dtype=[("a", np.float32)]),
        np.zeros(2, dtype=np.dtype((np.float32, (3,)), metadata={"a": 1})).view("V4"),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.array([1j]),
        np.array(["2021-07-30"], dtype="M8[D]"),
    ],
    ids=lambda array: str(array.dtype),
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path: Path, array: npt.NDArray[Any], protocol: int) -> None:
    with pytest.raises(CheckpointError, match=r"dtype is \w+, which is not numeric; refused"):
        read_haiku(write(tmp_path / "p.pickle", {"a": {"w": array}}, protocol))


class Forged:
    """An array with a state of its own."""

    def __init__(self, *state: object, subtype: type = np.ndarray) -> None:
        self.state, self.subtype = state, subtype

    def __reduce__(self) -> tuple[Any, ...]:
        return np.zeros(1).__reduce__()[0], (self.subtype, (0,), b"b"), self.state


class ForgedDType:
    """A number's dtype with a state of its own: with fields, or flags that make bytes pass for objects."""

    def __init__(self, *state: object) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("f4", False, True), self.state


F4 = np.dtype(np.float32)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (Forged(1, (4, 4), F4, False, b"1234"), "shape does not fit"),
        (Forged(1, (2**62, 4), F4, False, b""), "shape does not fit"),
        (Forged(1, (-1, -1), F4, False, b"1234"), "shape does not fit"),
        (Forged(1, (1.0,), F4, False, b"1234"), "shape does not fit"),
        (Forged(1, (1,) * 65, F4, False, b"1234"), "shape does not fit"),
        (Forged(1, [1], F4, False, b"1234"), "shape does not fit"),
        (Forged(1, (1,), F4, False, [1.0]), "array of objects"),
        (Forged(1, (1,), F4, False, "1234"), "array of objects"),
        (Forged(1, (1,), "f4", False, b"1234"), "array of objects"),
        (Forged((1,), F4, False, b"1234"), "unknown layout"),
        (Forged(1, (1,), ForgedDType(3, "<", None, ("a",), {"a": (F4, 0)}, -1, -1, 0), False, b"1234"), "with fields"),
        (Forged(1, (1,), ForgedDType(3, "<", (F4, (1,)), None, None, -1, -1, 0), False, b"1234"), "with fields"),
        (Forged(1, (1,), ForgedDType(3, "O", None, None, None, -1, -1, 63), False, b"1234"), "with fields"),
        (Forged(1, (1,), ForgedDType(3), False, b"1234"), "with fields"),
        (Forged(1, (1,), F4, False, b"1234", subtype=dict), r"names the class (__builtin__|builtins)\.dict"),
        (Forged(1, (1,), F4, False, b"1234", subtype=FlatMapping), "class is not numpy's"),
        (Call(np.ndarray, (2,)), "makes arrays in an unknown way"),
        (Call(np.dtype, F4), "dtype is of another kind"),
        (np.ma.masked_array([1.0], mask=[True]), r"names the class numpy\.ma"),
    ],
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_forged_arrays_are_refused(tmp_path: Path, array: object, message: str, protocol: int) -> None:
    with pytest.raises(CheckpointError, match=f"{message}.*; refused, nothing was executed"):
        read_haiku(write(tmp_path / "p.pickle", {"a": {"w": array}}, protocol))


def test_an_array_that_was_never_filled(tmp_path: Path) -> None:
    reconstruct: Any = np.zeros(1).__reduce__()[0]
    empty = Call(reconstruct, np.ndarray, (0,), b"b")

    with pytest.raises(CheckpointError, match="'a/w' is not one array"):
        read_haiku(write(tmp_path / "p.pickle", {"a": {"w": empty}}))
