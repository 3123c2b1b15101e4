# SPDX-License-Identifier: Apache-2.0
"""Hub ids, through huggingface_hub and its cache. The hub itself is not asked: tests run without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from perceiver_export.runtimes.errors import install_command

from .conftest import MakeCheckpoint

CODE = """
import sys
from perceiver_export.exporter import load_model
from perceiver_export.runtimes.errors import PerceiverExportError
def show(source):
    try:
        loaded = load_model(source, shape={"image": (3, 8, 8)})
        print(loaded.source, loaded.task)
    except PerceiverExportError as error:
        print(type(error).__name__, error.message, error.hint)
for source in sys.argv[1:]:
    show(source)
sys.modules["huggingface_hub"] = None
show("somebody/other")
"""


def answers(home: Path, *sources: str) -> list[str]:
    """A line a source, and one for a Hub id without huggingface_hub. It reads its settings once: in a new process."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *sources], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.splitlines()


def put_into_cache(checkpoint: Path, home: Path, hub_id: str) -> None:
    """As huggingface_hub lays it out: a snapshot a revision, and which revision main is."""
    model, revision = home / "hub" / f"models--{hub_id.replace('/', '--')}", "0" * 40
    shutil.copytree(checkpoint, model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)


def test_hub_ids_come_from_the_cache_and_paths_are_not_asked_of_the_hub(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    home, paths = tmp_path / "home", ("./nosuch/model", "../model", "nosuch/model/", "/nosuch/model")
    put_into_cache(make_checkpoint("fourier"), home, "somebody/small-perceiver")

    there, absent, *refused, without = answers(home, "somebody/small-perceiver", "somebody/other", *paths)

    assert there == "somebody/small-perceiver image-classification"
    assert absent.startswith("CheckpointError somebody/other is no directory, and cannot be downloaded")
    assert "hf download somebody/other" in absent
    assert all(line.startswith("CheckpointError") and "does not exist" in line for line in refused)
    assert len(refused) == len(paths)
    assert without.startswith("MissingDependencyError")
    assert install_command("hub") in without
