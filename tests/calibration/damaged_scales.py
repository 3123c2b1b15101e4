# SPDX-License-Identifier: Apache-2.0
"""Bundles whose files were changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.bundles import file_entries
from perceiver_export.calibration.graphs import save_graphs
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.bundle import read_manifest
from perceiver_export.runtimes.manifest import encode_manifest


def rehashed(path: Path) -> Path:
    """A bundle whose manifest has the digests of its files as they are now."""
    manifest = read_manifest(path)
    (path / "manifest.json").unlink()
    changed = msgspec.structs.replace(manifest, files=file_entries(path))
    (path / "manifest.json").write_bytes(encode_manifest(changed))
    return path


def with_a_scale_times(factor: float, group: str, bundle: Path, path: Path, ending: str = ".scales") -> Path:
    """A copy of a bundle in whose graphs the weight scales of one layer are wrong, or its weights in float."""
    part = open_bundle(shutil.copytree(bundle, path)).part()
    models = {file: ir.load(bundle / file) for file in {part.file, *part.lowered.values()}}
    for model in models.values():
        (name,) = [name for name in model.graph.initializers if name.startswith(group) and name.endswith(ending)]
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)
    save_graphs(models, path)
    return rehashed(path)
