# SPDX-License-Identifier: Apache-2.0
"""Builds that meet each other, are killed or find no room: whatever happens, the cache stays whole."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perceiver_export.runtimes import build, load, open_bundle
from perceiver_export.runtimes.errors import BuildError, UsageError
from perceiver_export.runtimes.files import cache_directory
from tests.runtimes.built_engines import compiled, left_behind, logits


def in_a_process(statement: str, **options: Any) -> subprocess.Popen[str]:
    code = f"import os, signal, sys, time\nfrom perceiver_export.runtimes import build\n{statement}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **options)


def test_two_processes_build_at_once_and_one_takes_what_the_other_made(copied_bundle: Path, target: str) -> None:
    slow = "lambda *what: (print(what[0]), time.sleep(1))"
    builds = [
        in_a_process(f"print(build({str(copied_bundle)!r}, {target!r}, progress={slow})[0].new)") for _ in range(2)
    ]
    answers = sorted(one.communicate(timeout=60)[0].splitlines() for one in builds)

    assert sorted(answer[-1] for answer in answers) == ["False", "True"]
    assert [one.returncode for one in builds] == [0, 0]
    assert left_behind(copied_bundle) == []
    assert logits(copied_bundle, target).shape == (1, 10)


def test_a_killed_build_leaves_nothing_that_the_next_one_minds(copied_bundle: Path, target: str) -> None:
    kill = "lambda *what: os.kill(os.getpid(), signal.SIGKILL)"
    killed = in_a_process(f"build({str(copied_bundle)!r}, {target!r}, progress={kill})")
    killed.communicate(timeout=60)

    assert killed.returncode == -signal.SIGKILL
    assert len(left_behind(copied_bundle)) == 1
    assert compiled(copied_bundle, target) == "at load"
    (built,) = build(copied_bundle, target)
    assert (built.new, left_behind(copied_bundle)) == (True, [])


def test_an_interrupted_build_cleans_up(copied_bundle: Path, target: str) -> None:
    def interrupt(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(copied_bundle, target, progress=interrupt)
    assert left_behind(copied_bundle) == []
    assert build(copied_bundle, target)[0].new


def test_a_full_disk_leaves_nothing_and_the_next_build_works(copied_bundle: Path, target: str) -> None:
    open_bundle(copied_bundle)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(BuildError) as caught:
            build(copied_bundle, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "space" in caught.value.hint
    assert left_behind(copied_bundle) == []
    assert build(copied_bundle, target)[0].new


def test_a_bundle_that_cannot_be_written_has_its_engines_in_the_users_cache(copied_bundle: Path, target: str) -> None:
    (copied_bundle / "engines").write_text("no directory can be made here", encoding="utf-8")
    (built,) = build(copied_bundle, target)

    assert built.directory.is_relative_to(cache_directory())
    assert compiled(copied_bundle, target) == str(built.directory)
    assert not build(copied_bundle, target)[0].new


def test_what_cannot_be_built_is_refused(copied_bundle: Path, target: str) -> None:
    with pytest.raises(UsageError, match="precision cannot be 'fp8'"):
        build(copied_bundle, target, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="hint cannot be 'speed'"):
        load(copied_bundle, target, hint="speed")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="throughput"):
        load(copied_bundle, target, hint="throughput", precision="auto")
    with pytest.raises(UsageError, match="no dimension 'batch'"):
        build(copied_bundle, target, shapes={"batch": (1, 2, 4)})
    assert not (copied_bundle / "engines").exists()
