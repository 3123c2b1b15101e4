# SPDX-License-Identifier: Apache-2.0
"""A quantized bundle of which one layer was damaged."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.graph_files import save_graphs
from perceiver_export.calibration.write import file_entries, new_bundle
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.manifest import encode_manifest


def with_a_scale_times(factor: float, group: str, bundle: Path, path: Path) -> Path:
    """A copy of a bundle in whose graphs the weight scales of one layer are wrong."""
    opened = open_bundle(bundle)
    part = opened.part()
    models = {file: ir.load(bundle / file) for file in {part.file, *part.lowered.values()}}
    for model in models.values():
        (name,) = [name for name in model.graph.initializers if name.startswith(group) and name.endswith(".scales")]
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)
    with new_bundle(path, overwrite=False) as directory:
        save_graphs(models, directory)
        for name in opened.manifest.files:
            if not (directory / name).exists():
                (directory / name).write_bytes((bundle / name).read_bytes())
        manifest = opened.manifest
        changed = msgspec.structs.replace(manifest, files=file_entries(directory))
        (directory / "manifest.json").write_bytes(encode_manifest(changed))
    return path
