# SPDX-License-Identifier: Apache-2.0
"""`export`: load a model, trace, fold and write it, and compare the result with its source."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import msgspec

from perceiver_export.calibration.bundles import absolute_place, file_entries, new_bundle, refuse_place
from perceiver_export.calibration.options import option
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.sources import check_installed, load_model, loaded_module
from perceiver_export.runtimes.bundle import GOLDEN, Bundle, open_bundle
from perceiver_export.runtimes.engines.backend import installed_version
from perceiver_export.runtimes.errors import BundleError, UnsupportedModelError, UsageError, check_kind
from perceiver_export.runtimes.manifest import (
    SCHEMA_VERSION,
    Check,
    Manifest,
    OutputKind,
    Part,
    TensorSpec,
    default_kinds,
    encode_manifest,
)
from perceiver_export.runtimes.npz import write_npz
from perceiver_export.runtimes.preprocessing import (
    AudioPreprocessing,
    Preprocessing,
    TextPreprocessing,
    VideoPreprocessing,
    unusable,
)
from perceiver_export.runtimes.runtime import Array
from perceiver_export.runtimes.tasks import checked_task

if TYPE_CHECKING:
    from torch import nn

    from perceiver_export.exporter.graphs import GraphPart, Split
    from perceiver_export.exporter.own import Inputs, OwnModel
    from perceiver_export.exporter.trace import FoldedGraph

DEFAULT_BUDGET = "512MiB"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_TOOLS = ("perceiver-export", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")

# progress(what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a model becomes a bundle. Each field carries its documentation, which `export --help` prints."""

    task: str | None = option(None, "What the model does. Your own bare model is `arrays` (the default) or `sets`.")
    parity: str | None = option(None, "Whose numerics to follow: huggingface or deepmind; by default the checkpoint's.")
    split: bool | None = option(
        None, "Encoder and decoder as separate graphs, to decode only the queries you need; by default for video only."
    )
    latents: str | None = option(
        None, "Split at this tensor, or at the end of this module; by default at the latents, if found.", "NAME"
    )
    dynamic_queries: bool = option(False, "Let split decoders take any number of queries per call.")
    batch: str | int | None = option(
        None,
        "Samples per call: a number, or a range. By default 1, or as many as your example inputs have.",
        "N|MIN:OPT:MAX",
    )
    shape: Mapping[str, tuple[int, ...]] = option(
        dict, "Fix a size, without the batch: image=3x224x224; queries=1024 per call of a split decoder."
    )
    config: str | os.PathLike[str] | None = option(
        None,
        "Sizes of a Haiku pickle that differ from the released model's; task and labels of an ONNX file.",
        "FILE.json",
    )
    like: str | os.PathLike[str] | None = option(
        None, "Take task, labels and preprocessing of an ONNX file from this bundle.", "BUNDLE"
    )
    use_transformers: bool = option(
        False, "Load a Hugging Face directory of any class with your installed transformers; its own code never runs."
    )
    fold: bool = option(True, "Rewrite the graph into an equivalent one with less work, where that pays.")
    memory_budget: str | int | None = option(
        None, f"Memory for activations, {DEFAULT_BUDGET} by default; larger stages run in pieces.", "SIZE"
    )
    truncate: bool = option(False, "Truncate texts that are too long for the model, instead of refusing them.")
    overwrite: bool = option(False, "Replace an existing bundle.")


_DEFAULTS = ExportOptions()


def export(
    source: str | os.PathLike[str] | LoadedModel | OwnModel | tuple[nn.Module, Inputs],
    output: str | os.PathLike[str],
    options: ExportOptions = _DEFAULTS,
    *,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model to a bundle at ``output``: a loaded one, an `OwnModel` or a pair (module, example inputs), or a
    source that `load_model` takes.

    The bundle is written only if the ONNX graph reproduces PyTorch's outputs on three random inputs, one of them large
    in magnitude: a hundred times the usual values, or ten times or once where float32 is too coarse for PyTorch itself.
    A model of 500 GFLOP per call or more may be compared on only two, on the second for one query in 17; the manifest
    lists what was compared. A failure leaves nothing behind.

    With ``fold`` the graph computes the same function in fewer operations, in pieces that keep the activations of the
    largest batch within ``memory_budget`` (bytes, or a string such as "512MiB"). A decoder that takes any number of
    queries is planned for 8192. The manifest records each decision. Without ``fold`` the graph keeps every projection
    of the model and is not cut into pieces.

    Raises CheckpointError, UnsupportedModelError, UsageError, ExportError, VerificationError, BundleExistsError,
    MissingDependencyError.
    """
    report = progress or (lambda what, done, total: None)
    check_installed()
    from perceiver_export.exporter.graphs import Batch, make_graphs, output_specs

    path, budget = absolute_place(output), _budget(options)
    batch = None if options.batch is None else Batch.parse(options.batch)
    refuse_place(path, options.overwrite)
    report("load", 0, 1)
    loaded = _load(source, options)
    split = _split(loaded, options)
    graphs = make_graphs(loaded, batch, split)
    with new_bundle(path, options.overwrite) as directory:
        folded = _write_graphs(loaded, graphs, split, options.fold, budget, directory, report)
        parts = {one.part.name: _recorded(one) for one in folded}
        checks = _verify(loaded, graphs, folded, directory, report)
        for name, content in loaded.files.items():
            (directory / name).write_bytes(content)
        whole = graphs[0].outputs if loaded.config is None else output_specs(loaded.config, batch or Batch.parse(1))
        outputs = whole if len(parts) > 1 else ()
        manifest = _manifest(path.name, loaded, parts, outputs, checks, directory)
        (directory / "manifest.json").write_bytes(encode_manifest(manifest))
        _check_task(open_bundle(directory, verify="never").manifest)
    report("done", 1, 1)
    return open_bundle(path)


def _is_split(options: ExportOptions, default: bool) -> bool:
    return options.latents is not None or default if options.split is None else options.split


def _num_queries(source: str, options: ExportOptions) -> tuple[int, ...] | None:
    """`--shape queries=…`, unless `queries` is an input of an ONNX file."""
    sizes = options.shape.get("queries", ())
    of_input = source.endswith(".onnx") and (len(sizes) > 1 or not _is_split(options, default=False))
    return None if of_input else sizes or None


def _split(loaded: LoadedModel, options: ExportOptions) -> Split | None:
    """How to split the model, None if it stays whole. Raises UsageError for options that have no effect."""
    from perceiver_export.exporter.graphs import Split

    queries = _num_queries(loaded.source, options)
    if not _is_split(options, loaded.split):
        if options.latents is not None:
            raise UsageError("--latents has no effect with --no-split", "leave --latents or --no-split out")
        if options.dynamic_queries or queries is not None:
            raise UsageError("only split bundles take queries", "add --split")
        return None
    if queries is not None and (len(queries) != 1 or queries[0] < 1):
        raise UsageError(f"the shape of `queries` is {list(queries)}", "give their number: --shape queries=1024")
    return Split(options.latents, None if queries is None else queries[0], options.dynamic_queries)


def parse_budget(text: str | int) -> int:
    """The bytes of a size such as ``"512MiB"`` or ``"1.5GB"``. Raises UsageError."""
    check_kind("--memory-budget", text, (str, int), "a size, for example 512MiB")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?)?B?\s*", str(text), re.IGNORECASE)
    if found is None:
        raise UsageError(f"--memory-budget {text!r} is not a size", "give a size such as 512MiB or 1.5GB")
    number, unit = found.groups()
    return int(float(number) * _UNITS[(unit or "").lower()])


def _budget(options: ExportOptions) -> int:
    if options.memory_budget is not None and not options.fold:
        raise UsageError("--memory-budget has no effect with --no-fold", "leave --memory-budget or --no-fold out")
    return parse_budget(DEFAULT_BUDGET if options.memory_budget is None else options.memory_budget)


def _load(
    source: str | os.PathLike[str] | LoadedModel | OwnModel | tuple[nn.Module, Inputs], options: ExportOptions
) -> LoadedModel:
    """The model in evaluation mode. Raises UnsupportedModelError if its preprocessing is unusable."""
    from perceiver_export.exporter.own import OwnModel

    of_decoders = _num_queries(str(source), options) is not None
    shape = {name: size for name, size in options.shape.items() if name != "queries" or not of_decoders}
    if isinstance(source, tuple) and len(source) == 2:
        source = OwnModel(*source)
    if isinstance(source, OwnModel):
        source = loaded_module(source)
    if not isinstance(source, LoadedModel):
        loaded = load_model(
            source,
            task=options.task,
            parity=options.parity,
            shape=shape,
            config=options.config,
            like=options.like,
            use_transformers=options.use_transformers,
        )
    elif options.task or options.parity or shape or options.config or options.use_transformers:
        raise UsageError("a loaded model already has its task, parity, shape and config", "pass them to load_model")
    else:
        loaded = source
    if options.truncate:
        if not isinstance(loaded.preprocessing, TextPreprocessing):
            raise UsageError(f"a model of {loaded.task} reads no text", "leave --truncate out")
        steps = msgspec.structs.replace(loaded.preprocessing, truncate=True)
        loaded = dataclasses.replace(loaded, preprocessing=steps)
    if loaded.preprocessing is not None and (found := unusable(loaded.preprocessing)):
        raise UnsupportedModelError(f"the model's preprocessing cannot be used: {found}", "correct its source")
    if loaded.config is not None:
        loaded.model.eval()  # your own may still be in training mode
    return loaded


def _write_graphs(
    loaded: LoadedModel,
    graphs: tuple[GraphPart, ...],
    split: Split | None,
    fold: bool,
    budget: int,
    directory: Path,
    report: Progress,
) -> list[FoldedGraph]:
    from perceiver_export.calibration.graphs import save_graphs
    from perceiver_export.exporter.trace import folded_graph, folded_parts

    folded = []
    for index, graph in enumerate(graphs):
        report(f"trace and fold {graph.name}", index, 3 * len(graphs))
        if loaded.config is None and split is not None:
            folded += folded_parts(graph, split, fold, budget)
        else:
            folded.append(folded_graph(graph, loaded.config, fold, budget))
    report("write", 1, 3)
    save_graphs({one.part.file: one.model for one in folded}, directory)
    return folded


def _recorded(folded: FoldedGraph) -> Part:
    from perceiver_export.calibration.graphs import stage_costs

    part, stages = folded.part, stage_costs(folded.model.graph)
    return Part(part.file, part.inputs, part.outputs, stages, part.num_queries, folded.folds, folded.plan)


def _verify(
    loaded: LoadedModel, graphs: tuple[GraphPart, ...], folded: list[FoldedGraph], directory: Path, report: Progress
) -> tuple[Check, ...]:
    """Compare the written graphs with torch, and keep the first case of each as golden.npz."""
    from perceiver_export.exporter.verification import verify

    # The parts of one graph are compared with it together.
    pairs = [(graphs[0], folded)] if loaded.config is None else [(one.part, [one]) for one in folded]
    checks: list[Check] = []
    golden: dict[str, Array] = {}
    for source, made in pairs:
        progress = functools.partial(report, f"verify {source.name}")
        found, arrays = verify(source, made, loaded.config, directory, progress)
        checks += found
        for part, own in arrays.items():
            # `input/image` of a whole model, `encoder/input/image` of a part
            prefix = "" if len(folded) == 1 else f"{part}/"
            golden |= {f"{prefix}{name}": array for name, array in own.items()}
    write_npz(directory / GOLDEN, golden)
    return tuple(checks)


def _manifest(
    name: str,
    loaded: LoadedModel,
    parts: dict[str, Part],
    outputs: tuple[TensorSpec, ...],
    checks: tuple[Check, ...],
    directory: Path,
) -> Manifest:
    # onnxruntime-gpu also provides the module onnxruntime
    tools = {name: installed_version(name) or "of another distribution" for name in _TOOLS}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        task=loaded.task,
        parity=loaded.parity,
        source=loaded.source,
        architecture={} if loaded.config is None else msgspec.to_builtins(loaded.config),
        parts={part: _with_frames(one, loaded.preprocessing) for part, one in parts.items()},
        preprocessing=loaded.preprocessing,
        labels=loaded.labels,
        precision="fp32",
        verification=checks,
        tools={"python": platform.python_version(), **tools},
        files=file_entries(directory),
        outputs=outputs,
        notes=loaded.notes,
        output_kinds=_kinds(loaded, [spec.name for spec in outputs or next(iter(parts.values())).outputs]),
    )


def _with_frames(part: Part, preprocessing: Preprocessing | None) -> Part:
    """The part, with the meaning of `frames` if preprocessing makes them; the graph does not say it."""
    if not isinstance(preprocessing, (VideoPreprocessing, AudioPreprocessing)):
        return part
    inputs = (
        msgspec.structs.replace(spec, meaning="RGB frames in [0, 1], channels last") if spec.name == "frames" else spec
        for spec in part.inputs
    )
    return msgspec.structs.replace(part, inputs=tuple(inputs))


def _kinds(loaded: LoadedModel, outputs: list[str]) -> dict[str, OutputKind]:
    """The kind of each output. Raises UnsupportedModelError if the model names an unknown output or kind."""
    for name, kind in loaded.output_kinds.items():
        for value, known in ((name, outputs), (kind, get_args(OutputKind))):
            if value not in known:
                raise UnsupportedModelError(
                    f"output_kinds has {name!r}: {kind!r}; {value!r} is unknown", f"use one of {', '.join(known)}"
                )
    return default_kinds(loaded.task, loaded.labels, outputs) | dict(loaded.output_kinds)


def _check_task(manifest: Manifest) -> None:
    """Raise BundleError, before publishing, for a bundle that no runtime would accept."""
    try:
        checked_task(manifest)
    except BundleError as error:
        own = "give what it lacks: LoadedModel.own(model, task, labels=…, preprocessing=…, output_kinds=…)"
        hint = own if manifest.parity == "own" else error.hint
        raise BundleError(f"the model does not fit its task: {error.message}", hint) from error
