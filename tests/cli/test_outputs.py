# SPDX-License-Identifier: Apache-2.0
"""No command writes over what it reads, into a bundle, or a file of another kind than it says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from perceiver_export.exporter.cli.files import check_output
from perceiver_export.runtimes.errors import UsageError
from tests.conftest import FASHION

from .commands import fail, succeed

PICTURE = FASHION / "pictures" / "bag.png"


def test_no_command_overwrites_what_it_reads(copied_bundle: Path, tmp_path: Path) -> None:
    picture = Path(shutil.copy(PICTURE, tmp_path / "bag.png"))
    data, figures = tmp_path / "data.npz", tmp_path / "layers.json"
    shutil.copy(FASHION / "test.npz", data)
    figures.write_text("{}")
    manifest = copied_bundle / "manifest.json"
    before = {path: path.read_bytes() for path in (picture, data, figures, manifest)}
    validate: list[str | Path] = ["validate", copied_bundle, "--data", data]

    assert "is read by this command" in fail("run", copied_bundle, picture, "-o", picture)
    assert "lies inside the bundle" in fail("run", copied_bundle, picture, "-o", manifest)
    for name in ("answers.png", "answers"):  # what it writes is JSON
        assert f"hint: name a file that does: {tmp_path / 'answers.json'}" in fail(
            "run", copied_bundle, picture, "-o", tmp_path / name
        )
    for folder, named in ((".", "NAME.json"), ("/", "/NAME.json"), (tmp_path, tmp_path / "NAME.json")):
        assert f"hint: name a file that does: {named}" in fail("run", copied_bundle, picture, "-o", folder)
    assert "does not end in .csv" in fail("bench", copied_bundle, "--csv", data)
    assert "lies inside the bundle" in fail("bench", copied_bundle, "--csv", copied_bundle / "a.csv")
    assert "does not end in .xml" in fail(*validate, "--junit", manifest)
    assert "lies inside the bundle" in fail(*validate, "--junit", copied_bundle / "gates.xml")
    assert "lies inside the bundle" in fail(*validate, "--save-worst", copied_bundle / "worst")
    quantize: list[str | Path] = ["quantize", copied_bundle, "-o", tmp_path / "int8"]
    assert "is read by this command" in fail(*quantize, "--data", figures, "--sensitivity", figures)
    assert "lies inside the bundle" in fail(*quantize, "--data", data, "--sensitivity", copied_bundle / "golden.json")
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "int8").exists()


def test_answers_may_lie_beside_the_pictures(fashion_bundle: Path, tmp_path: Path) -> None:
    shutil.copy(PICTURE, tmp_path / "bag.png")
    for _ in range(2):  # its own answers may be replaced
        succeed("run", fashion_bundle, tmp_path, "-o", tmp_path / "answers.json")


def test_links_and_directories_are_seen_through(tmp_path: Path) -> None:
    sample = tmp_path / "samples" / "0.npz"
    sample.parent.mkdir()
    sample.write_bytes(b"")
    (tmp_path / "link.npz").symlink_to(sample)

    for path, read in ((tmp_path / "link.npz", sample), (sample, tmp_path / "link.npz"), (sample, sample.parent)):
        with pytest.raises(UsageError, match="is read by this command"):
            check_output(path, [read])
    check_output(sample.with_name("new.npz"), [sample.parent, "module:function", "text\0", None])
