# SPDX-License-Identifier: Apache-2.0
"""A bundle is written whole or not at all, and only if it is right."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from perceiver_export.calibration import graphs
from perceiver_export.calibration.bundles import new_bundle
from perceiver_export.exporter import ExportOptions, LoadedModel, export, inspect_bundle, load_model, pipeline
from perceiver_export.exporter.graphs import Batch, whole_model
from perceiver_export.runtimes import Bundle, files, open_bundle
from perceiver_export.runtimes.errors import (
    BundleError,
    BundleExistsError,
    ExportError,
    PerceiverExportError,
    UnsupportedModelError,
    VerificationError,
)
from perceiver_export.runtimes.preprocessing import ImagePreprocessing, Normalize
from perceiver_export.runtimes.runtime import compare
from tests.calibration.onnx_text import write
from tests.conftest import MadeOnce
from tests.runtimes.built_engines import files_of_at_most

from .conftest import MakeCheckpoint


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it matters only that something is exported: a file, of which nothing is traced."""
    body = "(float[n,8] x) => (float[n,4000] y) { y = MatMul(x, w) }"
    return write(tmp_path_factory.mktemp("linear") / "linear.onnx", body, w=np.ones((8, 4000), np.float32))


@pytest.fixture
def there(one_layer: LoadedModel, made_once: MadeOnce, tmp_path: Path) -> Bundle:
    """A bundle of the model in the test's folder."""
    made = made_once("one-layer", lambda path: export(one_layer, path))
    return open_bundle(shutil.copytree(made, tmp_path / "bundle"))


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("checkpoint"))


def test_the_bundle_says_what_it_holds(one_layer: LoadedModel, there: Bundle, tmp_path: Path) -> None:
    manifest = there.manifest

    assert sorted(manifest.files) == ["golden.npz", "model.onnx", "model.weights"]
    assert len(manifest.verification) == 3
    assert all(check.difference < 1e-5 for check in manifest.verification)
    assert "normal values × 100" in manifest.verification[-1].inputs
    assert manifest.architecture["encoder"]["num_latents"] == 7
    assert manifest.tools["torch"] == torch.__version__.split("+")[0] or manifest.tools["torch"] == torch.__version__
    with np.load(tmp_path / "bundle" / "golden.npz") as golden:
        np.testing.assert_allclose(
            golden["output/logits"], one_layer.run({"image": golden["input/image"]})["logits"], atol=1e-6
        )


def test_inspection_adds_up(there: Bundle, tmp_path: Path) -> None:
    from_manifest, from_graph = inspect_bundle(there.path), inspect_bundle(there.path / "model.onnx")

    assert from_manifest.parts["model"].stages == from_graph.parts["model"].stages
    assert from_manifest.manifest == there.manifest
    assert sum(entry.size for entry in there.manifest.files.values()) == from_manifest.bytes_on_disk
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError):
        inspect_bundle(tmp_path / "broken.onnx")


@pytest.mark.usefixtures("there")
def test_an_existing_bundle_is_replaced_only_when_asked(linear: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleExistsError) as caught:
        export(linear, tmp_path / "bundle", ExportOptions(batch=2))
    assert "--overwrite" in caught.value.hint
    assert open_bundle(tmp_path / "bundle").part().inputs[0].shape[0] == 1

    export(linear, tmp_path / "bundle", ExportOptions(batch=2, overwrite=True))
    assert open_bundle(tmp_path / "bundle").part().inputs[0].shape[0] == 2
    assert left_in(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("file", "place", "error"),
    [
        ("thesis/chapter1.txt", "thesis", BundleExistsError),
        ("thesis/chapter1.txt", "thesis/chapter1.txt", BundleExistsError),
        ("extension/manifest.json", "extension", BundleExistsError),  # of another program
        ("file", "file/bundle", ExportError),
    ],
)
def test_what_is_not_a_bundle_is_never_replaced(
    file: str, place: str, error: type[PerceiverExportError], linear: Path, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('{"manifest_version": 3, "name": "theirs"}')
    with pytest.raises(error):
        export(linear, tmp_path / place, ExportOptions(overwrite=True))
    assert "theirs" in (tmp_path / file).read_text()


@pytest.mark.parametrize("stage", ["graph", "golden", "manifest"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_what_was_there(
    there: Bundle, linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, exists: bool
) -> None:
    if not exists:
        shutil.rmtree(there.path)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    name = {"graph": "save_graphs", "golden": "write_npz", "manifest": "encode_manifest"}[stage]
    monkeypatch.setattr(graphs if stage == "graph" else pipeline, name, full)
    with pytest.raises(ExportError, match="disk is full"):
        export(linear, tmp_path / "bundle", ExportOptions(overwrite=True))

    assert left_in(tmp_path) == (["bundle"] if exists else [])
    if exists:
        open_bundle(tmp_path / "bundle", verify="always")


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("two_steps", [False, True])
def test_an_exchange_that_fails_keeps_the_old_bundle(
    linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_steps: bool
) -> None:
    original = Path.rename

    def fail(*_: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            fail()
        return original(self, target)

    monkeypatch.setattr(files, "_exchanged", (lambda first, second: False) if two_steps else fail)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ExportError):
        export(linear, tmp_path / "bundle", ExportOptions(overwrite=True))

    assert left_in(tmp_path) == ["bundle"]
    open_bundle(tmp_path / "bundle", verify="always")


def test_ctrl_c_leaves_nothing(linear: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("verify"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(linear, tmp_path / "bundle", progress=interrupt)

    assert left_in(tmp_path) == []


def test_of_two_exports_to_one_place_the_first_to_finish_wins(tmp_path: Path) -> None:
    def write_slowly() -> None:
        with new_bundle(tmp_path / "bundle", False) as slow:
            (slow / "manifest.json").write_text("slow")
            with new_bundle(tmp_path / "bundle", False) as fast:
                (fast / "manifest.json").write_text("fast")

    with pytest.raises(BundleExistsError, match="in the meantime"):
        write_slowly()

    assert (tmp_path / "bundle" / "manifest.json").read_text() == "fast"
    assert left_in(tmp_path) == ["bundle"]


@pytest.mark.parametrize(("tensor", "value"), [("bias", 0.01), ("weight", 3e38)], ids=["differs", "overflows"])
def test_a_graph_that_is_not_the_model_is_refused(
    tensor: str, value: float, one_layer: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = graphs.save_graphs

    def save_another(models: Any, directory: Path) -> None:
        original(models, directory)
        with torch.no_grad():
            one_layer.model.state_dict()[f"decoder.output.{tensor}"].add_(value)  # torch is no longer what was written

    monkeypatch.setattr(graphs, "save_graphs", save_another)
    with pytest.raises(VerificationError):
        export(one_layer, tmp_path / "bundle")
    assert left_in(tmp_path) == []


def test_a_real_write_that_fails_leaves_nothing(linear: Path, tmp_path: Path) -> None:
    with files_of_at_most(50_000), pytest.raises(ExportError) as caught:
        export(linear, tmp_path / "bundle")
    assert "free some space" in caught.value.hint
    assert left_in(tmp_path) == []


@pytest.mark.usefixtures("there")
def test_a_link_to_a_bundle_stays_a_link(linear: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    export(linear, tmp_path / "link", ExportOptions(batch=2, overwrite=True))

    assert (tmp_path / "link").is_symlink()
    assert open_bundle(tmp_path / "bundle").part().inputs[0].shape[0] == 2
    assert left_in(tmp_path) == ["bundle", "link"]


@pytest.mark.usefixtures("there")
def test_a_bundle_that_no_reader_would_take_is_not_published(one_layer: LoadedModel, tmp_path: Path) -> None:
    assert isinstance(one_layer.preprocessing, ImagePreprocessing)
    broken = dataclasses.replace(one_layer, preprocessing=msgspec.structs.replace(one_layer.preprocessing, height=17))
    with pytest.raises(BundleError, match="image"):
        export(broken, tmp_path / "bundle", ExportOptions(overwrite=True))
    steps = (Normalize((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),)
    zero = dataclasses.replace(one_layer, preprocessing=msgspec.structs.replace(one_layer.preprocessing, steps=steps))
    with pytest.raises(UnsupportedModelError, match="std"):
        export(zero, tmp_path / "bundle", ExportOptions(overwrite=True))

    open_bundle(tmp_path / "bundle", verify="always")
    assert left_in(tmp_path) == ["bundle"]


@pytest.mark.usefixtures("there")
def test_an_overwrite_that_another_export_overtakes_loses_nothing_of_theirs(tmp_path: Path) -> None:
    def write_slowly() -> None:
        with new_bundle(tmp_path / "bundle", True) as slow:
            (slow / "manifest.json").write_text("slow")
            shutil.rmtree(tmp_path / "bundle")
            (tmp_path / "bundle").mkdir()
            (tmp_path / "bundle" / "theirs.txt").write_text("theirs")

    with pytest.raises(BundleExistsError, match="in the meantime"):
        write_slowly()

    assert (tmp_path / "bundle" / "theirs.txt").read_text() == "theirs"
    assert left_in(tmp_path) == ["bundle"]


def test_a_model_that_loses_digits_is_held_to_torchs_own_error(one_layer: LoadedModel, tmp_path: Path) -> None:
    """Large queries that the last bias takes away again: float32 torch is further than the tolerance from float64."""
    decoder: Any = one_layer.model.decoder
    shift = 1e4 * torch.randn(1, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoder.queries["logits"].table.add_(shift)
        decoder.output.bias.sub_((decoder.output.weight @ shift.T).squeeze(1))
    image = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    part = whole_model(one_layer.model, Batch.parse(1))
    exact = copy.deepcopy(part.module).double()(torch.from_numpy(image).double())[0].detach().numpy()
    own = compare(one_layer.run({"image": image})["logits"], exact, 1e-4)
    assert not own

    checks = export(one_layer, tmp_path / "bundle").manifest.verification

    assert all(check.difference <= check.tolerance for check in checks)
    assert checks[0].difference < 10 * own.difference


def test_the_bundle_says_what_was_assumed(there: Bundle, make_checkpoint: MakeCheckpoint) -> None:
    assert {note.split(":")[0] for note in there.manifest.notes} == {
        "no preprocessor_config.json",
        "images are 8 × 8, but the checkpoint's are 224 × 224",
        "config.json names no labels",
    }

    checkpoint = make_checkpoint("fourier")
    (checkpoint / "preprocessor_config.json").write_text('{"size": {"height": 8, "width": 8}}')
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"] = dict(enumerate("abcde"))
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert load_model(checkpoint).notes == ()  # which are the bundle's
