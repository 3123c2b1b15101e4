# SPDX-License-Identifier: Apache-2.0
"""Hub ids, through huggingface_hub and its cache. The hub itself is not asked: tests run without a network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from perceiver_export.exporter import load_model
from perceiver_export.runtimes.errors import CheckpointError, MissingDependencyError, install_command

from .conftest import MakeCheckpoint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a huggingface_hub that is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_into_cache(checkpoint: Path, cache: Path, hub_id: str) -> None:
    """As huggingface_hub lays it out: a snapshot a revision, and which revision main is."""
    model, revision = cache / f"models--{hub_id.replace('/', '--')}", "0" * 40
    shutil.copytree(checkpoint, model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)


def test_hub_ids_come_from_the_cache(make_checkpoint: MakeCheckpoint, cache: Path) -> None:
    put_into_cache(make_checkpoint("fourier"), cache, "somebody/small-perceiver")

    loaded = load_model("somebody/small-perceiver", shape={"image": (3, 8, 8)})
    assert (loaded.source, loaded.task) == ("somebody/small-perceiver", "image-classification")

    with pytest.raises(CheckpointError, match=r"somebody/other is not a directory and cannot be downloaded") as absent:
        load_model("somebody/other")
    assert "hf download somebody/other" in absent.value.hint


@pytest.mark.parametrize("path", ["./nosuch/model", "../model", "nosuch/model/", "/nosuch/model"])
def test_paths_are_not_asked_of_the_hub(path: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(path)


def test_a_hub_id_without_huggingface_hub_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError) as raised:
        load_model("somebody/other")
    assert install_command("hub") in raised.value.hint
