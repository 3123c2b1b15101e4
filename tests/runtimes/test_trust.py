# SPDX-License-Identifier: Apache-2.0
"""Engines that somebody else made or changed: never given to their library, whatever hashes say."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes import build, load
from perceiver_export.runtimes.bundle import sha256
from perceiver_export.runtimes.engines.cache import ENVIRONMENT, key_file
from perceiver_export.runtimes.errors import BuildError, EngineError
from tests.runtimes.built_engines import answered, compiled, edit_record, flip
from tests.runtimes.targets import EXPECTED


@pytest.fixture
def another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, configuration is another user's, who has built nothing yet."""
    return lambda: monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))


def forge(file: Path) -> None:
    """Change a bit, and the hash in engine.json."""
    flip(file)
    edit_record(file.parent, lambda record: record["files"][file.name].update(sha256=sha256(file)), sign=False)


def test_an_engine_that_was_changed_with_its_record_is_not_opened(
    built_bundle: Path, target: str, fashion_logits: Any, needs_engine: Callable[[], None]
) -> None:
    (built,) = build(built_bundle, target)
    for file in built.directory.iterdir():
        if file.name != "engine.json":
            forge(file)

    where, found = answered(built_bundle, target)
    assert where.startswith(f"at load, because the engine in {built.directory} cannot be used")
    np.testing.assert_array_equal(fashion_logits, found)
    needs_engine()
    with pytest.raises(EngineError) as caught:
        load(built_bundle, target)
    assert "perceiver-export build" in caught.value.hint
    assert ENVIRONMENT in caught.value.hint
    assert build(built_bundle, target)[0].new
    assert compiled(built_bundle, target) == str(built.directory)


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.update(mac=""),
        lambda record: record.update(mac="0" * 64),
        lambda record: record.update(mac="\u00e9"),
        lambda record: record.update(seconds=0.0),
        lambda record: record["identity"]["options"].update(hint="throughput"),
        lambda record: record["files"].pop(next(iter(record["files"]))),
    ],
    ids=["none", "another", "no digits", "seconds", "options", "files"],
)
def test_every_part_of_a_record_is_signed(built_bundle: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    (built,) = build(built_bundle, EXPECTED[0])
    edit_record(built.directory, edit, sign=False)

    assert compiled(built_bundle, EXPECTED[0]).startswith("at load")


def test_another_user_compiles_again_unless_the_key_is_shared(
    copied_bundle: Path, target: str, another_user: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (built,) = build(copied_bundle, target, precision="fp32", hint="throughput")
    own = key_file()
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    another_user()

    with load(copied_bundle, target, hint="throughput") as runtime:
        assert runtime.describe()["compiled"].startswith("at load, because")
        assert not key_file().exists()  # loading makes no key
    with monkeypatch.context() as patch:
        patch.setenv(ENVIRONMENT, str(own))
        with load(copied_bundle, target, hint="throughput") as runtime:
            assert runtime.describe()["compiled"] == str(built.directory)
    assert build(copied_bundle, target, hint="throughput")[0].new


def spoil(path: Path) -> None:
    path.write_bytes(b"short")
    path.chmod(0o600)


def link(path: Path) -> None:
    shutil.move(path, path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    "change",
    [lambda path: path.chmod(0o644), lambda path: path.chmod(0o620), spoil, link, pipe],
    ids=["readable", "writable", "short", "link", "pipe"],
)
def test_a_key_that_is_not_the_users_alone_is_refused(
    copied_bundle: Path, change: Callable[[Path], Any], another_user: Callable[[], None]
) -> None:
    another_user()
    (built,) = build(copied_bundle, EXPECTED[0])
    change(key_file())

    assert str(key_file()) in compiled(copied_bundle, EXPECTED[0])
    with pytest.raises(BuildError) as caught:
        build(copied_bundle, EXPECTED[0])
    assert str(key_file()) in caught.value.message
    assert ENVIRONMENT in caught.value.hint
    assert (built.directory / "engine.json").is_file()


def test_a_key_that_cannot_be_made_is_one_error(
    copied_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))

    with pytest.raises(BuildError) as caught:
        build(copied_bundle, EXPECTED[0])
    assert "\n" not in caught.value.message
    assert not list(copied_bundle.glob("engines/*/[0-9a-f]*"))


@pytest.mark.parametrize("place", ["engines", "engines/ort-cpu", "key"])
def test_links_on_the_way_to_an_engine_are_not_followed(built_bundle: Path, tmp_path: Path, place: str) -> None:
    """Neither to read what lies there, be it signed, nor to write."""
    (built,) = build(built_bundle, "ort-cpu")
    moved = built.directory if place == "key" else built_bundle / place
    elsewhere = tmp_path / "elsewhere"
    shutil.move(moved, elsewhere)
    moved.symlink_to(elsewhere)
    before = sorted((path, path.stat().st_mtime_ns) for path in elsewhere.rglob("*"))

    assert str(moved) in compiled(built_bundle, "ort-cpu")
    with pytest.raises(BuildError) as caught:
        build(built_bundle, "ort-cpu", force=True)
    assert str(moved) in caught.value.message
    assert sorted((path, path.stat().st_mtime_ns) for path in elsewhere.rglob("*")) == before


def test_a_record_that_is_a_link_is_not_followed(built_bundle: Path, tmp_path: Path) -> None:
    (built,) = build(built_bundle, "ort-cpu")
    shutil.move(built.directory / "engine.json", tmp_path / "engine.json")
    (built.directory / "engine.json").symlink_to(tmp_path / "engine.json")
    assert "engine.json" in compiled(built_bundle, "ort-cpu")
