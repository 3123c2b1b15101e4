# SPDX-License-Identifier: Apache-2.0
"""A bundle that was cut, changed, or made to lie is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perceiver_export.runtimes import bundle as bundle_module
from perceiver_export.runtimes import load, open_bundle, open_task
from perceiver_export.runtimes.errors import BundleError, UsageError

Edit = Callable[[str, str], Path]


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle of a file and nothing else: size and times stay."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", ["model.onnx", "model.weights", "golden.npz"])
def test_a_flipped_bit_is_found(copied_bundle: Path, name: str) -> None:
    flip_a_bit(copied_bundle / name)

    with pytest.raises(BundleError, match=f"{name} is not the file that was exported"):
        load(copied_bundle)


@pytest.mark.parametrize("name", ["model.onnx", "model.weights", "golden.npz"])
def test_a_truncated_or_missing_file_is_found_without_hashing(copied_bundle: Path, name: str) -> None:
    with (copied_bundle / name).open("rb+") as file:
        file.truncate(100)
    with pytest.raises(BundleError, match=r"has 100 bytes"):
        open_bundle(copied_bundle, verify="never")

    (copied_bundle / name).unlink()
    with pytest.raises(BundleError, match="is missing") as caught:
        open_bundle(copied_bundle, verify="never")
    assert str(caught.value) == f"{caught.value.message}\nhint: copy or export the bundle again"


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
    assert sorted(hashed) == ["golden.npz", "model.onnx", "model.weights"]
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


def test_a_newer_schema_is_refused(edit_manifest: Edit) -> None:
    with pytest.raises(BundleError, match="schema version 99"):
        load(edit_manifest('"schema_version": 1', '"schema_version": 99'))


@pytest.mark.parametrize("path", ["../model.onnx", "/etc/passwd", "a/../../b", "..\\\\b"])
def test_a_path_that_leaves_the_bundle_is_refused(edit_manifest: Edit, path: str) -> None:
    with pytest.raises(BundleError, match="outside the bundle"):
        load(edit_manifest('"model.onnx"', f'"{path}"'))


def test_a_file_that_is_not_hashed_is_not_loaded(edit_manifest: Edit) -> None:
    bundle = edit_manifest('"file": "model.onnx"', '"file": "other.onnx"')
    (bundle / "other.onnx").write_bytes((bundle / "model.onnx").read_bytes())

    with pytest.raises(BundleError, match="does not hash"):
        load(bundle)


def test_an_unknown_task_is_refused(edit_manifest: Edit) -> None:
    with pytest.raises(BundleError, match="unknown task 'fortune-telling'"):
        open_task(edit_manifest('"task": "image-classification"', '"task": "fortune-telling"'))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"schema_version": "1"}', b'{"schema_version": 1}']
)
def test_a_manifest_that_is_not_one_is_refused(copied_bundle: Path, content: bytes) -> None:
    (copied_bundle / "manifest.json").write_bytes(content)

    with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
        load(copied_bundle)


def test_values_that_cannot_be_are_refused(copied_bundle: Path) -> None:
    path = copied_bundle / "manifest.json"
    original = json.loads(path.read_text(encoding="utf-8"))
    preprocessing, part = original["preprocessing"], original["parts"]["model"]
    image = part["inputs"][0]
    changes: list[dict[str, Any]] = [
        {"schema_version": -5},
        {"parts": {}},
        {"labels": original["labels"][:9]},
        {"labels": [*original["labels"], "hat"]},
        *({"preprocessing": {**preprocessing, **step}} for step in BAD_STEPS),
        *(
            {"parts": {"model": {**part, "inputs": [{**image, "shape": shape}]}}}
            for shape in ([0, 3, 28, 28], ["batch", 3, 28, 28], [10**12, 3, 28, 28], [1, 3, 28, 27], [3, 28, 28])
        ),
        {"files": {**original["files"], "a\0b": original["files"]["model.onnx"]}},
    ]
    for change in changes:
        path.write_text(json.dumps({**original, **change}), encoding="utf-8")
        with pytest.raises(BundleError):
            open_task(copied_bundle)


BAD_STEPS: list[dict[str, Any]] = [
    {"height": 0},
    {"height": 10**12},
    *({"std": std} for std in ([0, 1, 1], [-1, 1, 1], [1, 1], [1] * 4)),
    {"mean": [0.5, 0.5]},
    {"crop_fraction": [1.5, 1.5]},
    {"crop_fraction": [-1, -1]},
    {"resample": "nearest"},
    {"scale": None},
]


def test_a_link_out_of_the_bundle_is_refused(copied_bundle: Path, tmp_path: Path) -> None:
    (copied_bundle / "model.weights").rename(tmp_path / "outside.weights")
    (copied_bundle / "model.weights").symlink_to(tmp_path / "outside.weights")

    with pytest.raises(BundleError, match="link out of it"):
        load(copied_bundle)


def test_a_graph_that_is_garbage_with_the_right_hash_is_refused(copied_bundle: Path) -> None:
    path = copied_bundle / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    (copied_bundle / "model.onnx").write_bytes(b"garbage")
    manifest["files"]["model.onnx"] = {"sha256": hashlib.sha256(b"garbage").hexdigest(), "size": 7}
    path.write_text(json.dumps(manifest), encoding="utf-8")

    with pytest.raises(BundleError, match="cannot be loaded"):
        load(copied_bundle)


def test_a_place_without_a_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(BundleError, match=r"is not a bundle|does not exist"):
            load(path)


def test_an_unknown_way_to_verify_is_refused(fashion_bundle: Path) -> None:
    with pytest.raises(UsageError):
        load(fashion_bundle, verify="sometimes")  # type: ignore[arg-type]


def test_a_graph_with_other_tensors_than_the_manifest_says_is_refused(edit_manifest: Edit) -> None:
    with pytest.raises(BundleError, match="other tensors than the manifest says"):
        load(edit_manifest('"name": "logits"', '"name": "scores"'))
