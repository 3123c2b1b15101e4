# SPDX-License-Identifier: Apache-2.0
"""Hub ids, through huggingface_hub and its cache. The hub itself is not asked: tests run without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .conftest import MakeCheckpoint

CODE = """
import sys
from perceiver_export.exporter import load_model
from perceiver_export.runtimes.errors import PerceiverExportError
try:
    loaded = load_model(sys.argv[1], shape={"image": (3, 8, 8)})
    print(loaded.source, loaded.task)
except PerceiverExportError as error:
    print(type(error).__name__, error.message, error.hint)
"""


def load(hub_id: str, home: Path, code: str = CODE) -> str:
    """In a process of its own: huggingface_hub reads its settings once."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, hub_id]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def put_into_cache(checkpoint: Path, home: Path, hub_id: str) -> None:
    """As huggingface_hub lays it out: a snapshot a revision, and which revision main is."""
    model, revision = home / "hub" / f"models--{hub_id.replace('/', '--')}", "0" * 40
    shutil.copytree(checkpoint, model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)


def test_a_hub_id_is_loaded_from_the_cache(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    put_into_cache(make_checkpoint("fourier"), tmp_path / "home", "somebody/small-perceiver")

    assert load("somebody/small-perceiver", tmp_path / "home") == "somebody/small-perceiver image-classification"


def test_a_hub_id_that_cannot_be_had(tmp_path: Path) -> None:
    answer = load("somebody/small-perceiver", tmp_path / "home")

    assert answer.startswith("CheckpointError somebody/small-perceiver is no directory, and cannot be had from the hub")
    assert "hf download somebody/small-perceiver" in answer


def test_paths_are_not_asked_of_the_hub(tmp_path: Path) -> None:
    for path in ("./nosuch/model", "../model", "nosuch/model/", "/nosuch/model"):
        answer = load(path, tmp_path / "home")
        assert answer.startswith("CheckpointError")
        assert "does not exist" in answer, path


def test_without_huggingface_hub_the_extra_is_named(tmp_path: Path) -> None:
    answer = load("somebody/small-perceiver", tmp_path, "import sys; sys.modules['huggingface_hub'] = None\n" + CODE)

    assert answer.startswith("MissingDependencyError")
    assert "perceiver-export[hub]" in answer
