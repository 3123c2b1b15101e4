# SPDX-License-Identifier: Apache-2.0
"""Where bundles are written, and what a quantized one takes along: no source is lost, nothing useless is copied."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perceiver_export.calibration import QuantizeOptions, quantize
from perceiver_export.calibration.bundles import check_new_directory, copy_tree, refuse_place
from perceiver_export.calibration.quantization.search import search
from perceiver_export.calibration.validation.certify import check_certifiable
from perceiver_export.exporter import export
from perceiver_export.exporter.cli.output import check_file
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.errors import BundleError, DataError, ExportError, PerceiverExportError, UsageError
from perceiver_export.runtimes.files import check_writable
from tests.calibration.asked import HELD_OUT, TEST, quantizing
from tests.cli.commands import fail, succeed
from tests.conftest import FASHION, SmallBundle


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _search(source: Path, out: Path, **options: Any) -> None:
    splits: dict[str, Any] = {"calibrate": HELD_OUT, "search_on": HELD_OUT, "certify_on": TEST}
    search(source, out, quantizing(min_agreement=50.0, **options), **splits)


def _quantize(source: Path, out: Path, **options: Any) -> None:
    quantize(source, HELD_OUT, out, QuantizeOptions(**options))


@pytest.mark.parametrize("write", [_quantize, _search])
@pytest.mark.parametrize("overwrite", [True, False])
def test_no_bundle_takes_the_place_of_its_source(
    write: Callable[..., None], overwrite: bool, copied_bundle: Path
) -> None:
    link = copied_bundle.with_name("link")
    link.symlink_to(copied_bundle)
    before = contents(copied_bundle)

    for source, out in ((copied_bundle, copied_bundle), (copied_bundle, link), (link, copied_bundle)):
        with pytest.raises(UsageError, match="would overwrite its own source"):
            write(source, out, overwrite=overwrite)
    assert "its own source" in fail("quantize", link, "--data", HELD_OUT, "-o", copied_bundle, "--overwrite")
    assert contents(copied_bundle) == before


def test_no_bundle_is_written_into_another(copied_bundle: Path, fashion_bundle: Path, tmp_path: Path) -> None:
    before = contents(copied_bundle)
    (tmp_path / "link").symlink_to(copied_bundle)

    for out in (copied_bundle / "new", tmp_path / "link" / "far" / "new"):
        for write in (_quantize, _search):
            with pytest.raises(UsageError, match="inside the bundle"):
                write(fashion_bundle, out)
        with pytest.raises(UsageError, match="inside the bundle"):
            export(FASHION / "checkpoint", out)
    assert contents(copied_bundle) == before


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody may write into ``folder``, which root could anyway."""
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)
        folder.chmod(0o755)


def test_places_that_cannot_be_written_are_refused_before_the_work(copied_bundle: Path, tmp_path: Path) -> None:
    folder = copied_bundle.parent
    (tmp_path / "file").write_text("no directory")
    checks: list[Callable[[Path], None]] = [
        check_writable,
        check_file,
        lambda place: refuse_place(place, overwrite=False),
        lambda place: check_new_directory(place, "--save-worst", DataError),
    ]

    check_certifiable(copied_bundle)
    for check in checks:
        check(folder / "new")
        with pytest.raises(PerceiverExportError, match="file"):
            check(tmp_path / "file" / "new")
    with locked(folder):
        for check in checks:
            with pytest.raises(PerceiverExportError, match=r"new cannot be written"):
                check(folder / "new")
        with pytest.raises(ExportError, match=r"bundle cannot be written"):
            check_certifiable(copied_bundle)


@pytest.mark.usefixtures("untimed")
def test_weights_of_lowered_graphs_stay_behind_and_the_manifest_of_another_program_is_no_bundle(
    small_bundle: SmallBundle, tmp_path: Path
) -> None:
    source = shutil.copytree(small_bundle("points"), tmp_path / "bundle")
    succeed("build", source, "--target", "tensorrt", "--precision", "fp16", "--lower-only")
    assert "tensorrt-fp16.weights" in open_bundle(source).manifest.files
    (tmp_path / "manifest.json").write_text('{"name": "an extension"}')

    made = quantize(source, "random", tmp_path / "int8", QuantizeOptions(samples=2))

    assert {name for name in made.manifest.files if name.endswith(".weights")} == {"model.weights"}
    assert not list(made.path.glob("*fp16*"))


def test_a_copy_follows_no_link_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "engines").mkdir(parents=True)
    (source / "engines" / "blob").write_text("x")
    target.mkdir()

    copy_tree(source, target)
    assert (target / "engines" / "blob").read_text() == "x"

    (source / "engines" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "c").mkdir()
    with pytest.raises(BundleError, match="link"):
        copy_tree(source, tmp_path / "c")
