# SPDX-License-Identifier: Apache-2.0
"""Names that came from a file steer no terminal, and no document that is made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.calibration.asked import pictures
from tests.cli.commands import perceiver_export
from tests.conftest import FASHION

EVIL = "\x1b[31mred\x9b2J\u202e\x07<script>|"


@pytest.fixture
def evil_bundle(fashion_bundle: Path, tmp_path: Path) -> Path:
    """The demo's bundle with a label that clears the screen, and a source that turns text round."""
    bundle = Path(shutil.copytree(fashion_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["labels"] = [EVIL, *manifest["labels"][1:]]
    manifest["name"] = manifest["source"] = EVIL
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return bundle


def harmless(text: str) -> bool:
    return not any(character in text for character in "\x1b\x9b\u202e\x07")


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_answers_and_descriptions(evil_bundle: Path, json_flag: tuple[str, ...]) -> None:
    picture = next((FASHION / "images").iterdir())
    commands: tuple[tuple[str | Path, ...], ...] = (
        ("run", evil_bundle, picture, "--top", "10", *json_flag),
        ("inspect", evil_bundle, *json_flag),
        ("run", evil_bundle, f"{EVIL}.png"),
    )
    for command in commands:
        said = perceiver_export(*command)
        assert "red" in said.stdout + said.stderr
        assert harmless(said.stdout + said.stderr)


@pytest.mark.usefixtures("one_process")
def test_documents(evil_bundle: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "d.npz", slice(40))
    command = ("validate", evil_bundle, "--data", data, "--junit", tmp_path / "j.xml", "--report")
    served = ("package", evil_bundle, "--for", "triton", "-o", tmp_path / "served")
    for words in ((*command, tmp_path / "r.md"), (*command, tmp_path / "r.html"), served):
        assert perceiver_export(*words).returncode == 0

    ElementTree.parse(tmp_path / "j.xml")
    labels = next((tmp_path / "served").rglob("labels.txt"))
    config = next((tmp_path / "served").rglob("config.pbtxt"))
    for path in (tmp_path / "j.xml", tmp_path / "r.md", tmp_path / "r.html", labels, config):
        assert harmless(path.read_text(encoding="utf-8")), path
    for path in (tmp_path / "r.md", tmp_path / "r.html"):
        assert "<script>" not in path.read_text(encoding="utf-8")
