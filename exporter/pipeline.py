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

from perceiver_export.calibration.write import file_entries, new_bundle, refuse_place
from perceiver_export.exporter.batch import Batch
from perceiver_export.exporter.budget import DEFAULT_BUDGET, parse_budget
from perceiver_export.exporter.load import load_model
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.errors import UnsupportedModelError, UsageError
from perceiver_export.runtimes.loading import open_engine
from perceiver_export.runtimes.manifest import SCHEMA_VERSION, Check, Manifest, Part, TensorSpec, encode_manifest
from perceiver_export.runtimes.preprocessing import unusable
from perceiver_export.runtimes.runtime import Array, Runtime
from perceiver_export.runtimes.tasks import checked_task

if TYPE_CHECKING:
    import onnx_ir as ir

    from perceiver_export.exporter.fold.folded import FoldedPerceiver
    from perceiver_export.exporter.fold.sites import Sites
    from perceiver_export.exporter.parts import GraphPart
    from perceiver_export.exporter.perceiver.model import PerceiverIO

# progress(what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]

GOLDEN = "golden.npz"
_TOOLS = ("perceiver-export", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def export(
    source: str | os.PathLike[str] | LoadedModel,
    out: str | os.PathLike[str],
    *,
    task: str | None = None,
    parity: str | None = None,
    split: bool | None = None,
    dynamic_queries: bool = False,
    batch: str | int = 1,
    shape: Mapping[str, tuple[int, ...]] | None = None,
    config: str | os.PathLike[str] | None = None,
    fold: bool = True,
    memory_budget: str | int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint to a bundle at ``out``, verified against torch; nothing is written if anything fails.

    ``split`` writes encoder and decoder apart, so that a caller decodes only the queries it needs; None splits where
    decoding all of them in one call would not fit into memory (video). A decoder takes a fixed number of queries a call
    (``shape={"queries": (n,)}`` sets it), or with ``dynamic_queries`` any number up to that. ``batch`` is a number or
    ``"MIN:OPT:MAX"``; ``shape`` fixes an input's size without the batch, e.g. ``{"image": (3, 224, 224)}``. ``config``
    is the JSON file of sizes that a bare state dict comes with. A `LoadedModel` may be given instead of a path.

    ``fold`` rewrites the model into an exactly equal one with less work, site by site where that pays, in pieces that
    keep the activations within ``memory_budget`` (bytes, or e.g. ``"512MiB"``, which is the default) at the largest
    batch; a decoder of any number of queries is planned for calls of 8192. The manifest says what was chosen. Without
    ``fold`` the graph has every projection as the model has it, and no pieces.

    Raises CheckpointError, UnsupportedModelError, UsageError, ExportError, VerificationError, BundleExistsError,
    MissingDependencyError.
    """
    report = progress or (lambda what, done, total: None)
    path = Path(os.path.abspath(out))  # so that "." and "bundle/" have a name too
    sizes = Batch.parse(batch)
    shapes = dict(shape or {})
    queries = shapes.pop("queries", None)
    if memory_budget is not None and not fold:
        raise UsageError(
            "a graph without folds has no pieces to fit a budget", "leave --memory-budget or --no-fold out"
        )
    budget = parse_budget(DEFAULT_BUDGET if memory_budget is None else memory_budget)
    refuse_place(path, overwrite)
    report("load", 0, 1)
    if isinstance(source, LoadedModel):
        if task or parity or shapes or config:
            raise UsageError("a loaded model has its task, parity, shape and config", "give these to load_model")
        loaded = source
    else:
        loaded = load_model(source, task=task, parity=parity, shape=shapes, config=config)
    _check_preprocessing(loaded)
    loaded.model.eval()  # one's own may come from training
    from perceiver_export.exporter.parts import output_specs

    split = loaded.split if split is None else split
    cut = (sizes, split, dynamic_queries, queries)
    references = _parts(loaded.model, *cut)
    sites, graphs = None, references
    if fold:
        folded = _folded(loaded.model, budget, *cut)
        sites, graphs = folded.sites, _parts(folded, *cut)
    with new_bundle(path, overwrite) as directory:
        parts = _write_graphs(loaded, graphs, sites, directory, report)
        checks = _verify(loaded, references, parts, directory, report)
        outputs = output_specs(loaded.config, sizes) if len(graphs) > 1 else ()
        manifest = _manifest(path.name, loaded, parts, outputs, checks, directory)
        (directory / "manifest.json").write_bytes(encode_manifest(manifest))
        checked_task(open_bundle(directory, verify="never").manifest)  # what no reader would take is not published
    report("done", 1, 1)
    return open_bundle(path)


def _check_preprocessing(loaded: LoadedModel) -> None:
    """Raise UnsupportedModelError before hours of work that no reader of the bundle would take."""
    if loaded.preprocessing is not None and (found := unusable(loaded.preprocessing)):
        raise UnsupportedModelError(
            f"the model's preprocessing cannot be used: {found}", "mend what it was loaded from"
        )


def _folded(
    model: PerceiverIO, budget: int, batch: Batch, split: bool, dynamic_queries: bool, queries: tuple[int, ...] | None
) -> FoldedPerceiver:
    from perceiver_export.exporter.fold.folded import FoldedPerceiver
    from perceiver_export.exporter.fold.sites import choose_sites
    from perceiver_export.exporter.parts import planned_queries

    at_once = planned_queries(model.config, queries[0] if queries else None, dynamic_queries) if split else None
    return FoldedPerceiver(model, choose_sites(model, budget, batch.most, at_once))


def _parts(
    model: PerceiverIO, batch: Batch, split: bool, dynamic_queries: bool, queries: tuple[int, ...] | None
) -> tuple[GraphPart, ...]:
    from perceiver_export.exporter.parts import split_model, whole_model

    if queries is not None and (len(queries) != 1 or queries[0] < 1):
        raise UsageError(f"the shape of `queries` is {list(queries)}", "give their number: --shape queries=1024")
    if split:
        graphs = split_model(model, batch, dynamic_queries, queries[0] if queries else None)
        if (dynamic_queries or queries) and all(graph.num_queries is None for graph in graphs):
            raise UsageError(
                "no decoder of this model is asked for some of its queries",
                "leave --dynamic-queries and --shape queries=… out",
            )
        return graphs
    if dynamic_queries or queries:
        raise UsageError("queries are chosen in split bundles only", "add --split")
    return (whole_model(model, batch),)


def _write_graphs(
    loaded: LoadedModel, graphs: tuple[GraphPart, ...], sites: Sites | None, directory: Path, report: Progress
) -> dict[str, Part]:
    from perceiver_export.calibration.costs import stage_costs
    from perceiver_export.calibration.graph_files import save_graphs
    from perceiver_export.exporter.trace import trace

    models: dict[str, ir.Model] = {}
    parts: dict[str, Part] = {}
    for index, graph in enumerate(graphs):
        report(f"trace {graph.name}", index, 3 * len(graphs))
        file = f"{graph.name}.onnx"
        models[file] = trace(graph, loaded.config)
        stages = stage_costs(models[file].graph)
        part = Part(file, graph.inputs, graph.outputs, stages, graph.num_queries)
        parts[graph.name] = part if sites is None else sites.recorded(part, graph.name)
    report("write", 1, 3)
    save_graphs(models, directory)
    return parts


def _verify(
    loaded: LoadedModel, graphs: tuple[GraphPart, ...], parts: dict[str, Part], directory: Path, report: Progress
) -> tuple[Check, ...]:
    """Run what was written, compare it with torch, and keep the first case of each part as golden.npz."""
    from perceiver_export.exporter.verify import verify

    checks: list[Check] = []
    golden: dict[str, Array] = {}
    for index, graph in enumerate(graphs):

        def progress(done: int, total: int, index: int = index) -> None:
            report("verify", len(graphs) * total + index * total + done, 2 * len(graphs) * total)

        def load(graph: GraphPart = graph) -> Runtime:
            engine = open_engine(directory / parts[graph.name].file, "ort-cpu", threads=None)
            return Runtime(engine, graph.inputs, graph.outputs, "fp32")

        found, arrays = verify(graph, loaded.config, load, progress)
        checks += found
        # `input/image` of a whole model, `encoder/input/image` of a part
        prefix = "" if len(graphs) == 1 else f"{graph.name}/"
        golden |= {f"{prefix}{name}": array for name, array in arrays.items()}
    _save_arrays(directory / GOLDEN, golden)
    return tuple(checks)


def _manifest(
    name: str,
    loaded: LoadedModel,
    parts: dict[str, Part],
    outputs: tuple[TensorSpec, ...],
    checks: tuple[Check, ...],
    directory: Path,
) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        task=loaded.task,
        parity=loaded.parity,
        source=loaded.source,
        architecture=msgspec.to_builtins(loaded.config),
        parts=parts,
        preprocessing=loaded.preprocessing,
        labels=loaded.labels,
        precision="fp32",
        verification=checks,
        tools=_tools(),
        files=file_entries(directory),
        outputs=outputs,
        notes=loaded.notes,
    )


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
