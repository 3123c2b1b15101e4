# SPDX-License-Identifier: Apache-2.0
"""Where bundles are written, and what a quantized one takes along: no source is lost, nothing useless is copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perceiver_export.calibration.mixed_precision import search
from perceiver_export.calibration.pipeline import quantize
from perceiver_export.exporter import export
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.errors import UsageError
from tests.cli.commands import fail, succeed
from tests.conftest import FASHION

HELD_OUT = FASHION / "held_out.npz"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _search(source: Path, out: Path, **options: Any) -> None:
    splits: dict[str, Any] = {"calibrate": HELD_OUT, "search_on": HELD_OUT, "certify_on": FASHION / "test.npz"}
    search(source, out, **splits, min_agreement=50.0, **options)


def _quantize(source: Path, out: Path, **options: Any) -> None:
    quantize(source, HELD_OUT, out, **options)


@pytest.mark.parametrize("write", [_quantize, _search])
@pytest.mark.parametrize("overwrite", [True, False])
def test_no_bundle_takes_the_place_of_its_source(
    write: Callable[..., None], overwrite: bool, copied_bundle: Path
) -> None:
    link = copied_bundle.with_name("link")
    link.symlink_to(copied_bundle)
    before = contents(copied_bundle)

    for source, out in ((copied_bundle, copied_bundle), (copied_bundle, link), (link, copied_bundle)):
        with pytest.raises(UsageError, match="would take the place of its own source"):
            write(source, out, overwrite=overwrite)
    assert "its own source" in fail("quantize", link, "--data", HELD_OUT, "-o", copied_bundle, "--overwrite")
    assert contents(copied_bundle) == before


def test_no_bundle_is_written_into_another(copied_bundle: Path, fashion_bundle: Path, tmp_path: Path) -> None:
    before = contents(copied_bundle)
    (tmp_path / "link").symlink_to(copied_bundle)

    for out in (copied_bundle / "new", tmp_path / "link" / "far" / "new"):
        for write in (_quantize, _search):
            with pytest.raises(UsageError, match="lies inside the bundle"):
                write(fashion_bundle, out)
        with pytest.raises(UsageError, match="lies inside the bundle"):
            export(FASHION / "checkpoint", out)
    assert contents(copied_bundle) == before


def test_the_manifest_of_another_program_is_no_bundle(fashion_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "an extension"}')
    made = quantize(fashion_bundle, HELD_OUT, tmp_path / "new", samples=8)
    assert made.path == tmp_path / "new"


def test_weights_of_lowered_graphs_stay_behind(copied_bundle: Path, tmp_path: Path) -> None:
    succeed("build", copied_bundle, "--target", "tensorrt", "--precision", "fp16", "--lower-only")
    assert "tensorrt-fp16.weights" in open_bundle(copied_bundle).manifest.files

    made = quantize(copied_bundle, HELD_OUT, tmp_path / "int8", samples=8)

    assert {name for name in made.manifest.files if name.endswith(".weights")} == {"model.weights"}
    assert not list(made.path.glob("*fp16*"))


@pytest.mark.parametrize("wishes", [{"keep_float": ["*"]}, {"precision": {"*": "float"}}])
def test_nothing_left_to_quantize_is_refused(wishes: dict[str, Any], fashion_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layer is left to quantize"):
        quantize(fashion_bundle, HELD_OUT, tmp_path / "out", **wishes)
    assert not (tmp_path / "out").exists()
