# SPDX-License-Identifier: Apache-2.0
"""A bundle that was cut, changed or forged is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from perceiver_export.runtimes import bundle as bundle_module
from perceiver_export.runtimes import load, open_bundle, open_task
from perceiver_export.runtimes.errors import BundleError, UsageError
from perceiver_export.runtimes.manifest import (
    FileEntry,
    Manifest,
    OutputKind,
    Part,
    TensorSpec,
    assumed_note,
    decode_manifest,
    encode_manifest,
    judged_output,
)
from perceiver_export.runtimes.tasks.image_files import resize_cubic
from tests.runtimes.built_engines import flip

Edit = Callable[[str, str], Path]
FILES = ("model.onnx", "model.weights", "golden.npz")


def change(bundle: Path, **fields: Any) -> dict[str, Any]:
    """Replace fields of the manifest; None removes one. Gives the manifest as it was."""
    path = bundle / "manifest.json"
    before: dict[str, Any] = json.loads(path.read_bytes())
    path.write_text(json.dumps({name: value for name, value in {**before, **fields}.items() if value is not None}))
    return before


def flip_a_bit(path: Path) -> None:
    """And nothing else: size and times stay."""
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, 100)


def move_out(path: Path) -> None:
    outside = path.parent.with_name("outside")
    shutil.move(path, outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink, move_out])
def test_a_damaged_file_is_named(copied_bundle: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(copied_bundle / name)

    with pytest.raises(BundleError) as raised:  # a flipped bit is found by its hash alone
        open_bundle(copied_bundle, verify="auto" if damage is flip_a_bit else "never")
    assert name in raised.value.message
    assert str(raised.value) == f"{raised.value.message}\nhint: {raised.value.hint}"


def test_a_graph_reads_no_weights_that_the_manifest_does_not_list(copied_bundle: Path) -> None:
    graph = (copied_bundle / "model.onnx").read_bytes().replace(b"model.weights", b"other.weights")
    (copied_bundle / "model.onnx").write_bytes(graph)
    (copied_bundle / "model.weights").rename(copied_bundle / "other.weights")
    change(copied_bundle, files={"model.onnx": {"sha256": hashlib.sha256(graph).hexdigest(), "size": len(graph)}})

    with pytest.raises(BundleError) as raised:
        load(copied_bundle)
    assert "other.weights" in raised.value.message


def test_a_graph_that_is_garbage_with_the_right_hash_is_refused(copied_bundle: Path) -> None:
    (copied_bundle / "model.onnx").write_bytes(b"garbage")
    files = change(copied_bundle)["files"]
    change(copied_bundle, files={**files, "model.onnx": {"sha256": hashlib.sha256(b"garbage").hexdigest(), "size": 7}})

    with pytest.raises(BundleError) as raised:
        load(copied_bundle)
    assert "model.onnx" in raised.value.message


def test_a_stamp_spares_the_second_hashing_and_any_change_of_time_renews_it(
    copied_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    original = bundle_module.sha256

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return original(path)

    monkeypatch.setattr(bundle_module, "sha256", counted)

    open_bundle(copied_bundle)
    assert sorted(hashed) == sorted(FILES)
    open_bundle(copied_bundle)
    assert len(hashed) == 3
    os.utime(copied_bundle / "model.onnx")
    open_bundle(copied_bundle)
    assert hashed[3:] == ["model.onnx"]
    open_bundle(copied_bundle, verify="always")
    assert len(hashed) == 7


def test_a_cache_that_cannot_be_written_only_costs_time(
    copied_bundle: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache / "file"))

    assert open_bundle(copied_bundle).manifest.task == "image-classification"


def test_damaged_stamps_are_not_believed(copied_bundle: Path, own_cache: Path) -> None:
    open_bundle(copied_bundle)
    for stamp in (own_cache / "perceiver-export" / "verified").iterdir():
        stamp.write_text("[1, 2")
    flip_a_bit(copied_bundle / "model.onnx")

    with pytest.raises(BundleError):
        open_bundle(copied_bundle)


def test_a_manifest_of_version_1_is_read() -> None:
    tokens, mask = TensorSpec("tokens", "int32", (1, 4)), TensorSpec("tokens_mask", "int32", (1, 4))
    part = Part("m.onnx", (tokens, mask), (TensorSpec("logits", "float32", (1, 2)),))
    old = Manifest(
        *(1, "m", "text-classification", "own", "", {"inputs": {"tokens": {"vocabulary_size": 9}}}, {"model": part}),
        *(None, ("no", "yes"), "fp32", (), {}, {"m.onnx": FileEntry("", 1)}),
    )

    read = decode_manifest(encode_manifest(old))

    assert [spec.values for spec in read.parts["model"].inputs] == [(0, 8), (0, 1)]
    assert read.output_kinds == {"logits": "single-label"}
    assert judged_output(read) == judged_output(old) == ("logits", "single-label")


def test_labels_judge_the_only_output_that_has_a_kind(fashion_bundle: Path) -> None:
    manifest = open_bundle(fashion_bundle).manifest
    kinds: list[tuple[dict[str, OutputKind], tuple[str, OutputKind] | None]] = [
        ({"embedding": "none", "value": "regression"}, ("value", "regression")),
        ({"embedding": "none"}, None),
        ({"cola": "single-label", "stsb": "regression"}, None),
    ]
    for given, expected in kinds:
        assert judged_output(msgspec.structs.replace(manifest, output_kinds=given)) == expected


OLD_IMAGES = {
    "type": "image",
    "height": 28,
    "width": 28,
    "crop_fraction": [0.875, 0.875],
    "scale": 1 / 255,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}


@pytest.mark.parametrize("resample", ["bicubic", "opencv-bicubic"])
def test_images_of_a_manifest_of_version_1_are_prepared_as_before(
    copied_bundle: Path, resample: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = {"schema_version": 1, "output_kinds": None, "preprocessing": {**OLD_IMAGES, "resample": resample}}
    change(copied_bundle, **old)
    rows = np.random.default_rng(0).integers(0, 256, (40, 51, 3), dtype=np.uint8)

    with open_task(copied_bundle) as classify:
        found = classify.preprocess(rows)
        classify(rows)

    deepmind = resample == "opencv-bicubic"  # whose crop begins on the other side of the middle
    middle = rows[3:38, 8:43] if deepmind else rows[2:37, 8:43]
    small = np.asarray(Image.fromarray(middle).resize((28, 28), Image.Resampling.BICUBIC))
    resized = resize_cubic(middle, 28, 28) if deepmind else small
    np.testing.assert_allclose(found, (resized / 255 - 0.5).transpose(2, 0, 1) / 0.25, atol=1e-6)
    # The assumed kinds are logged once.
    assert [one.levelname for one in caplog.records if "logits: single-label" in one.getMessage()] == ["WARNING"]
    again = decode_manifest(encode_manifest(classify.manifest))  # as quantize writes it
    assert "logits: single-label" in assumed_note(again) == assumed_note(classify.manifest)

    change(copied_bundle, preprocessing={**OLD_IMAGES, "resample": resample, "crop_fraction": [1.5, None]})
    with pytest.raises(BundleError):
        open_task(copied_bundle)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"schema_version": 2', '"schema_version": 99', "99"),
        *(('"model.onnx"', f'"{path}"', "unsafe") for path in ("../m", "/etc/passwd", "a/../../b", "..\\\\b")),
        ('"file": "model.onnx"', '"file": "model.weights.onnx"', "model.weights.onnx"),  # nobody hashed it
        ('"task": "image-classification"', '"task": "fortune-telling"', "fortune-telling"),
        ('"name": "logits"', '"name": "scores"', ""),
    ],
)
def test_a_forged_manifest_is_refused(edit_manifest: Edit, old: str, new: str, said: str) -> None:
    bundle = edit_manifest(old, new)
    shutil.copy(bundle / "model.onnx", bundle / "model.weights.onnx")

    with pytest.raises(BundleError) as raised, open_task(bundle) as task:
        task(np.zeros((28, 28), np.uint8))
    assert said in raised.value.message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"schema_version": "1"}', b'{"schema_version": 1}']
)
def test_a_manifest_that_is_not_one_is_refused(copied_bundle: Path, content: bytes) -> None:
    (copied_bundle / "manifest.json").write_bytes(content)

    with pytest.raises(BundleError, match=r"manifest\.json"):
        load(copied_bundle)


def test_values_that_cannot_be_are_refused(copied_bundle: Path) -> None:
    original = change(copied_bundle)
    preprocessing, part = original["preprocessing"], original["parts"]["model"]
    image = part["inputs"][0]
    shapes = ([0, 3, 28, 28], ["batch", 3, 28, 28], [10**12, 3, 28, 28], [1, 3, 28, 27], [3, 28, 28])
    changes: list[dict[str, Any]] = [
        {"schema_version": -5},
        {"parts": {}},
        {"labels": original["labels"][:9]},
        {"labels": [*original["labels"], "hat"]},
        *({"preprocessing": {**preprocessing, **step}} for step in BAD_STEPS),
        *({"parts": {"model": {**part, "inputs": [{**image, "shape": shape}]}}} for shape in shapes),
        {"files": {**original["files"], "a\0b": original["files"]["model.onnx"]}},
    ]
    for one in changes:
        change(copied_bundle, **{**original, **one})
        with pytest.raises(BundleError):
            open_task(copied_bundle)


BAD_STEPS: list[dict[str, Any]] = [
    {"height": 0},
    {"height": 10**12},
    {"steps": None},
    *(
        {"steps": [step]}
        for step in (
            *({"type": "normalize", "mean": [0, 0, 0], "std": std} for std in ([0, 1, 1], [-1, 1, 1], [1, 1], [1] * 4)),
            {"type": "normalize", "mean": [0.5, 0.5], "std": [1, 1, 1]},
            {"type": "center-crop-share", "vertical": -1, "horizontal": 0.5},
            {"type": "center-crop", "height": 10**6, "width": 5},
            {"type": "resize", "height": 28, "width": 28, "resample": "nearer"},
            {"type": "resize", "height": 0, "width": 28, "resample": "bicubic"},
            {"type": "rescale", "factor": None},
            {"type": "rescale", "factor": 0},
            {"type": "rotate"},
        )
    ),
    {"steps": [{"type": "rescale", "factor": 1}, {"type": "resize", "height": 9, "width": 9, "resample": "box"}]},
]


def test_a_place_without_a_bundle_and_an_unknown_verify_are_refused(fashion_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(BundleError) as raised:
            load(path)
        assert str(path) in raised.value.message
    with pytest.raises(UsageError):
        load(fashion_bundle, verify="sometimes")  # type: ignore[arg-type]


def test_threads_may_be_the_first_to_read_a_manifest(fashion_bundle: Path) -> None:
    """msgspec prepares a type at its first use; two threads that did so at once crashed 20 of 25 processes."""
    code = """
import sys, threading
from pathlib import Path
from perceiver_export.runtimes.bundle import read_manifest
ready = threading.Barrier(4)
threads = [threading.Thread(target=lambda: (ready.wait(), read_manifest(Path(sys.argv[1])))) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code, str(fashion_bundle)], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
