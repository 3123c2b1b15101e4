# SPDX-License-Identifier: Apache-2.0
"""Bundles that tests share. Nothing here imports torch: the runtime's tests also run where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FASHION = REPOSITORY / "examples" / "fashion_mnist"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own user cache, so that none believes another's stamps."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture(scope="session")
def plain_fashion_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without folds: every projection of the model is a layer of the graph. Read it, do not change it."""
    from perceiver_export.exporter import export

    return export(FASHION / "checkpoint", tmp_path_factory.mktemp("bundles") / "plain", fold=False).path


@pytest.fixture(scope="session")
def fashion_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model as a bundle; read it, do not change it. PERCEIVER_TEST_BUNDLE names one made elsewhere."""
    made = os.environ.get("PERCEIVER_TEST_BUNDLE")
    if made:
        return Path(made)
    from perceiver_export.exporter import export

    return export(FASHION / "checkpoint", tmp_path_factory.mktemp("bundles") / "fashion").path


@pytest.fixture
def copied_bundle(fashion_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo's bundle, to be damaged."""
    return Path(shutil.copytree(fashion_bundle, tmp_path / "bundle"))


@pytest.fixture
def copied_plain_bundle(plain_fashion_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo's bundle without folds."""
    return Path(shutil.copytree(plain_fashion_bundle, tmp_path / "bundle"))


@pytest.fixture
def edit_manifest(copied_bundle: Path) -> Callable[[str, str], Path]:
    """Replace text in the copy's manifest, and give the copy."""

    def edit(old: str, new: str) -> Path:
        manifest = copied_bundle / "manifest.json"
        text = manifest.read_text(encoding="utf-8")
        assert old in text
        manifest.write_text(text.replace(old, new), encoding="utf-8")
        return copied_bundle

    return edit
