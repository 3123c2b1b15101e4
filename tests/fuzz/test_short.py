# SPDX-License-Identifier: Apache-2.0
"""A short run of each harness, on a fixed seed: what `make fuzz` runs for as long as it is given."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SmallBundle
from tests.fuzz import kills, readers

_CASES = 60  # of each reader


@pytest.fixture(scope="module")
def targets(small_bundle: SmallBundle) -> dict[str, readers.Target]:
    return readers.targets(small_bundle("points"))


def test_every_reader_takes_whole_files(targets: dict[str, readers.Target], tmp_path: Path) -> None:
    for name, target in targets.items():
        for number, seed in enumerate(target.seeds):
            directory = tmp_path / f"{name}-{number}"
            directory.mkdir()
            for file, content in {**target.beside, target.file: seed}.items():
                (directory / file).write_bytes(content)
            if b"PS-Adobe" not in seed:  # EPS: no decoder but those of the documented formats is started
                target.read(directory / target.file)


def test_damaged_files_are_read_or_refused(
    targets: dict[str, readers.Target], capfd: pytest.CaptureFixture[str]
) -> None:
    failed = [name for name, target in targets.items() if not readers.run_apart(name, target, 0, _CASES)[1]]

    assert not failed, capfd.readouterr().out


def test_killed_commands_lose_nothing(fashion_bundle: Path, tmp_path: Path) -> None:
    """In a process of its own, which has no threads when it forks."""
    places = ["--bundle", str(fashion_bundle), "--directory", str(tmp_path)]
    command = [sys.executable, kills.__file__, "--kills", "6", "--only", "build,export", *places]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    killed = re.search(r"(\d+) killed, 0 lost", done.stdout)
    assert killed
    assert int(killed[1]) >= 2
