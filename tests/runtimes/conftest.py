# SPDX-License-Identifier: Apache-2.0
"""Runtimes that the tests of every target share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from perceiver_export.runtimes import Runtime, build, load
from perceiver_export.runtimes.engines.backend import TARGETS
from tests.runtimes.built_engines import IMAGE
from tests.runtimes.targets import EXPECTED

Ask = Callable[..., Any]


@pytest.fixture(params=EXPECTED, scope="module")
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["at load", "built"], scope="module")
def runtime(request: pytest.FixtureRequest, target: str, fashion_bundle: Path, engines: Path) -> Iterator[Runtime]:
    path = engines if request.param == "built" else fashion_bundle
    with load(path, target, verify="never") as loaded:  # no stamps outside of a test's own cache
        yield loaded


@pytest.fixture(scope="session")
def engines(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle with an engine for every target."""
    copy = Path(shutil.copytree(fashion_bundle, tmp_path_factory.mktemp("engines") / "fashion"))
    for target in EXPECTED:
        build(copy, target)
    return copy


@pytest.fixture(scope="module")
def fashion_logits(target: str, fashion_bundle: Path) -> Any:
    """What the target answers where it compiles at load."""
    with load(fashion_bundle, target, verify="never") as loaded:
        return loaded.run({"image": IMAGE})["logits"]


@pytest.fixture
def needs_engine(target: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, the target does not compile at load."""
    changed = msgspec.structs.replace(TARGETS[target], needs_engine=True)
    return lambda: monkeypatch.setitem(TARGETS, target, changed)


@pytest.fixture
def built_bundle(engines: Path, tmp_path: Path) -> Path:
    """A copy of `engines`, to be damaged; `build` finds its engines there."""
    return Path(shutil.copytree(engines, tmp_path / "bundle"))


@pytest.fixture
def golden(fashion_bundle: Path) -> dict[str, Any]:
    with np.load(fashion_bundle / "golden.npz") as arrays:
        return {"image": arrays["input/image"], "logits": arrays["output/logits"]}


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """``ask(task, *inputs, as_json=False, **options)``: what `run` prints of a task of `models`, or its JSON.

    With ``opens=False`` the test fails where the task is opened.
    """
    from perceiver_export.exporter.cli.answers import Request
    from perceiver_export.exporter.cli.output import quiet
    from perceiver_export.exporter.cli.run import run_task

    def run(task: Any, *inputs: str | Path, as_json: bool = False, opens: bool = True, **options: Any) -> Any:
        def open_task(*_: Any) -> Any:
            return nullcontext(task) if opens else pytest.fail("the task was opened")

        monkeypatch.setattr("perceiver_export.runtimes.tasks.open_task", open_task)
        with quiet(json=as_json):
            run_task(task.manifest.task, Request("bundle", list(map(str, inputs)), **options))
        shown = capsys.readouterr().out
        return json.loads(shown) if as_json else shown

    return run
