# SPDX-License-Identifier: Apache-2.0
"""Reading files that nobody vouches for; writing files that are whole or absent, whenever the writer dies."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from perceiver_export.runtimes import files
from perceiver_export.runtimes.errors import BundleError, InputError
from perceiver_export.runtimes.files import (
    exchange,
    inside,
    parsing,
    private_cache,
    read_bytes,
    read_json,
    replacing,
    write_bytes,
    writing,
)


def link(path: Path) -> None:
    path.with_suffix(".target").write_text("{}")
    path.symlink_to(path.with_suffix(".target"))


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


HOSTILE: dict[str, Callable[[Path], object]] = {
    "link": link,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": os.mkfifo,
    "socket": bound_socket,
    "directory": Path.mkdir,
    "terabyte": sparse,
    "missing": lambda path: None,
    "nested": lambda path: path.write_text("[" * 5000 + "]" * 5000),
    "nested objects": lambda path: path.write_text('{"a":' * 200 + "1" + "}" * 200),
    "not UTF-8": lambda path: path.write_bytes(b'"\xff"'),
    "cut": lambda path: path.write_text('{"a": '),
    "other type": lambda path: path.write_text("[1]"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_file_of_ours_is_one_error_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    HOSTILE[kind](path)
    start = time.monotonic()

    with pytest.raises(BundleError) as caught:
        read_json(path, dict[str, object], BundleError, "hint")

    assert str(path) in caught.value.message
    assert time.monotonic() - start < 2


def test_brackets_in_strings_are_no_depth(tmp_path: Path) -> None:
    content = {"labels": ["[MASK]", "{x}", "[", '"{', "\\", '\\"['] * 1000}
    (tmp_path / "f.json").write_text(json.dumps(content))

    assert read_json(tmp_path / "f.json", dict[str, object]) == content


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")

    assert read_bytes(tmp_path / "f", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes"):
        read_bytes(tmp_path / "f", 4)


@pytest.mark.parametrize(
    "name", ["../x", "x/../y", "/etc/passwd", "a\\b", "a\0b", "", ".", ".hidden", "a//b", "a b", "é"]
)
def test_names_that_leave_a_directory_never_become_paths(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        inside(tmp_path, name)


def test_a_directory_is_exchanged_and_nothing_is_left(tmp_path: Path) -> None:
    place = tmp_path / "b"
    for content in ("old", "new"):
        with replacing(place, directory=True) as temporary:
            (temporary / "f").write_text(content)

    assert (place / "f").read_text() == "new"
    assert os.listdir(tmp_path) == ["b"]


def test_files_are_written_into_a_directory_that_is_written_itself(tmp_path: Path) -> None:
    with replacing(tmp_path / "out", directory=True) as folder:
        write_bytes(folder / "first.txt", b"1")
        with replacing(folder / "inner", directory=True) as inner, replacing(inner / "second.txt") as temporary:
            temporary.write_text("2", encoding="utf-8")

    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["first.txt", "inner", "second.txt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "f.json").symlink_to("real.json")

    write_bytes(tmp_path / "f.json", b"new")

    assert (tmp_path / "f.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    write_bytes(tmp_path / "f", b"old")

    with pytest.raises(TypeError), replacing(tmp_path / "f") as temporary:
        temporary.write_bytes([b"half", "no bytes"])  # type: ignore[arg-type]

    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


@pytest.mark.parametrize("directory", [False, True])
def test_an_interrupt_before_anything_is_locked_leaves_nothing(
    directory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        assert path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "locked", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "written", directory=directory):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(errno.EIO, "Input/output error"), "X cannot be read: Input/output error"),
        (PermissionError("permission denied"), "X cannot be read: permission denied"),
        (FileNotFoundError("no such file"), "X does not exist"),
        (OSError("image file is truncated"), "X is damaged: image file is truncated"),
        (ValueError("3 bytes"), "X is damaged: 3 bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_not_called_damaged(raised: Exception, said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}"), parsing("X", "is damaged", "copy it again"):
        raise raised


def test_a_full_disk_is_said_to_be_full() -> None:
    with pytest.raises(InputError, match="the disk is full"), writing("out.json"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")


@pytest.mark.parametrize("two_steps", [False, True])
def test_both_ways_of_an_exchange_swap(two_steps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if two_steps:
        monkeypatch.setattr(files, "_exchanged", lambda first, second: False)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()

    exchange(tmp_path / "a", tmp_path / "b")

    assert os.listdir(tmp_path / "a") == ["b"]
    assert os.listdir(tmp_path / "b") == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


KILLED = """
import os, signal, sys
from pathlib import Path
from perceiver_export.runtimes import files
place = Path(sys.argv[1])
if sys.argv[2] == "between":  # a file system without renameat2, killed after its first rename
    files._exchanged = lambda first, second: False
    rename = Path.rename
    def once(self, target):
        rename(self, target)
        if target.name.endswith(".old"):
            os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = once
with files.replacing(place, directory=True) as temporary:
    (temporary / "f").write_text("new")
    if sys.argv[2] == "within":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "alive":
        print("ready", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("when", ["within", "between"])
def test_what_a_killed_writer_left_is_put_back_and_removed(
    when: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "b"
    with replacing(place, directory=True) as temporary:
        (temporary / "f").write_text("old")

    died = subprocess.run([sys.executable, "-c", KILLED, str(place), when], check=False)

    assert died.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2  # the temporary, and the old one or what was moved aside
    with caplog.at_level(logging.WARNING):
        files.recover(place)
    assert (place / "f").read_text() == "old"
    assert ("was restored" in caplog.text) == (when == "between")
    with replacing(place, directory=True) as temporary:
        (temporary / "f").write_text("newer")
    assert os.listdir(tmp_path) == ["b"]


def test_what_a_live_writer_writes_is_not_removed(tmp_path: Path) -> None:
    place = tmp_path / "b"
    command = [sys.executable, "-c", KILLED, str(place), "alive"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        with replacing(place, directory=True) as temporary:
            (temporary / "f").write_text("mine")
        writer.communicate("")

    assert writer.returncode == 0
    assert (place / "f").read_text() == "new"
    assert os.listdir(tmp_path) == ["b"]


def test_the_cache_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "perceiver-export").mkdir(mode=0o755)

    assert private_cache().stat().st_mode & 0o777 == 0o700

    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError):
        private_cache()
