# SPDX-License-Identifier: Apache-2.0
"""The export command's work: checkpoint -> torch model -> graph -> verified bundle."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from perceiver_export.exporter.batch import Batch
from perceiver_export.exporter.load import LoadedModel, load_model
from perceiver_export.exporter.write import file_entries, new_bundle, refuse_existing
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.manifest import SCHEMA_VERSION, Check, Manifest, Part, encode_manifest
from perceiver_export.runtimes.runtime import Array, Runtime, open_engine

if TYPE_CHECKING:
    import onnx_ir as ir

# progress(what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]

GRAPH, WEIGHTS, GOLDEN = "model.onnx", "model.weights", "golden.npz"
_TOOLS = ("perceiver-export", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def export(
    source: str | os.PathLike[str] | LoadedModel,
    out: str | os.PathLike[str],
    *,
    task: str | None = None,
    parity: str | None = None,
    batch: str | int = 1,
    shape: Mapping[str, tuple[int, ...]] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint to a bundle at ``out``, verified against torch; nothing is written if anything fails.

    ``batch`` is a number or ``"MIN:OPT:MAX"``; ``shape`` fixes the input's size without the batch, e.g.
    ``{"image": (3, 224, 224)}``. A `LoadedModel` may be given instead of a path.

    Raises CheckpointError, UnsupportedModelError, UsageError, ExportError, VerificationError, BundleExistsError,
    MissingDependencyError.
    """
    report = progress or (lambda what, done, total: None)
    path = Path(os.path.abspath(out))  # so that "." and "bundle/" have a name too
    sizes = Batch.parse(batch)
    refuse_existing(path, overwrite)
    report("load", 0, 4)
    loaded = source if isinstance(source, LoadedModel) else load_model(source, task=task, parity=parity, shape=shape)
    # They import torch, which `load_model` has checked is there.
    from perceiver_export.exporter.costs import stage_costs
    from perceiver_export.exporter.trace import tensor_specs, trace

    report("trace", 1, 4)
    model = trace(loaded.model, sizes)
    inputs, outputs = ((spec,) for spec in tensor_specs(loaded.model, sizes))
    part = Part(GRAPH, inputs, outputs, stage_costs(model.graph))
    with new_bundle(path, overwrite) as directory:
        report("write", 2, 4)
        _save_graph(model, directory)
        report("verify", 3, 4)
        checks = _verify(loaded, part, sizes, directory, report)
        manifest = _manifest(path.name, loaded, part, checks, directory)
        (directory / "manifest.json").write_bytes(encode_manifest(manifest))
        open_bundle(directory, verify="never")  # what no reader would take is not published
    report("done", 4, 4)
    return open_bundle(path)


def _verify(loaded: LoadedModel, part: Part, batch: Batch, directory: Path, report: Progress) -> tuple[Check, ...]:
    """Run what was written, compare it with torch, and keep the first case as golden.npz."""
    from perceiver_export.exporter.verify import verify

    engine = open_engine(directory / part.file, "ort-cpu", threads=None)
    with Runtime(engine, part.inputs, part.outputs, "fp32") as runtime:
        checks, golden = verify(loaded.model, runtime, batch, lambda done, of: report("verify", 3 * of + done, 4 * of))
    _save_arrays(directory / GOLDEN, golden)
    return checks


def _manifest(name: str, loaded: LoadedModel, part: Part, checks: tuple[Check, ...], directory: Path) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        task=loaded.task,
        parity=loaded.parity,
        source=loaded.source,
        architecture=msgspec.to_builtins(loaded.config),
        parts={"model": part},
        preprocessing=loaded.preprocessing,
        labels=loaded.labels,
        precision="fp32",
        verification=checks,
        tools=_tools(),
        files=file_entries(directory),
        notes=loaded.notes,
    )


def _save_graph(model: ir.Model, directory: Path) -> None:
    """model.onnx, and its weights beside it: an engine then maps them instead of holding them twice."""
    import onnx_ir as ir

    model.producer_name = "perceiver-export"
    model.producer_version = importlib.metadata.version("perceiver-export")
    ir.save(model, directory / GRAPH, external_data=WEIGHTS)


def _save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """An npz whose bytes depend on the arrays alone (numpy's own holds the time of writing)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), buffer.getvalue(), zipfile.ZIP_DEFLATED
            )


def _tools() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: _version(name) for name in _TOOLS}}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of another distribution"  # onnxruntime-gpu brings the module onnxruntime
