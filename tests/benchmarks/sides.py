# SPDX-License-Identifier: Apache-2.0
"""Full-size models, ours and transformers', and one call of each, measured in a fresh process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests.benchmarks.harness import Row, fresh

ENGINES = ("ort", "openvino")
_LEAST_MS = 1000.0
Call = Callable[[dict[str, Any]], Any]


def make_pair(preset: str, work: Path, with_plain: bool = True) -> tuple[Path, Path | None]:
    """Our folded bundle and the plain graph of the same random weights; no graph if transformers lacks the model."""
    from perceiver_export.exporter import ExportOptions, OwnModel, export
    from tests.benchmarks.plain_models import plain_export, transformers_model, zoo_export
    from tests.zoo.models import RELEASED, ZOO

    bundle, plain = work / f"{preset}-folded", work / f"{preset}-plain" / "model.onnx"
    if (bundle / "manifest.json").is_file() and (plain.is_file() or not with_plain):
        return bundle, plain if with_plain else None
    if preset in RELEASED:
        module, inputs = ZOO[preset](**RELEASED[preset])
        export(OwnModel(module, inputs), bundle, ExportOptions(overwrite=True))
        zoo_export(module, inputs, plain)
        return bundle, plain
    model = transformers_model(preset) if with_plain else None
    if model is None:
        export(f"preset:{preset}", bundle, ExportOptions(overwrite=True))
        return bundle, None
    model.save_pretrained(work / f"{preset}-checkpoint")
    export(work / f"{preset}-checkpoint", bundle, ExportOptions(overwrite=True))
    plain_export(preset, model, golden_inputs(bundle), plain)
    return bundle, plain


def golden_inputs(bundle: Path) -> dict[str, Any]:
    """The inputs that the bundle's first part was verified with."""
    from perceiver_export.runtimes.bundle import golden_arrays, open_bundle

    opened = open_bundle(bundle)
    return golden_arrays(opened, next(iter(opened.manifest.parts)), "input")


def save_feeds(work: Path, name: str, feeds: Mapping[str, Any]) -> Path:
    """Write the feeds to a file for `timed`."""
    path = work / f"{name}.npz"
    np.savez(path, allow_pickle=False, **feeds)
    return path


def timed(source: Path, engine: str, threads: int, feeds: Path, precision: str | None = None) -> Row:
    """Time a bundle, a graph loaded as in its engine's documentation, or transformers' model, in a fresh process."""
    return fresh(_timed, source, engine, threads, feeds, precision)


def output_of(feeds: Path, engine: str) -> Any:
    """The first output of the last call with these feeds on this engine."""
    return np.load(feeds.with_suffix(f".{engine}.npy"))


def _timed(source: str, engine: str, threads: int, feeds: str, precision: str | None) -> Row:
    """Milliseconds of the median call, of at least two calls and one second; peak MiB, and MiB before the load."""
    from perceiver_export.runtimes import Runtime  # noqa: F401  counted before the load
    from perceiver_export.runtimes.machine import peak_memory

    __import__({"ort": "onnxruntime", "openvino": "openvino"}.get(engine, "torch"))
    before = peak_memory()
    load = (
        _load_torch
        if engine.startswith("torch")
        else _load_graph
        if source.endswith((".onnx", ".xml"))
        else _load_bundle
    )
    call = load(source, engine, threads, precision)
    given = dict(np.load(feeds))
    times: list[float] = []
    while len(times) < 3 or sum(times[1:]) < _LEAST_MS:
        start = time.perf_counter()
        values = call(given)
        times.append((time.perf_counter() - start) * 1e3)
    np.save(Path(feeds).with_suffix(f".{engine}.npy"), values)
    return {"ms": median(times[1:]), "MiB": peak_memory(), "MiB before": before}


def _load_bundle(bundle: str, engine: str, threads: int, precision: Any) -> Call:
    from perceiver_export.runtimes import load

    runtime = load(bundle, f"{engine}-cpu", threads=threads, precision=precision)
    return lambda feeds: next(iter(runtime.run(feeds).values()))


def _load_torch(checkpoint: str, engine: str, threads: int, _: object) -> Call:
    import torch

    from tests.benchmarks.plain_models import plain_module
    from tests.zoo.models import RELEASED, ZOO

    torch.set_num_threads(threads)
    zoo = Path(checkpoint).name.removesuffix("-checkpoint")
    zoo = zoo if zoo in RELEASED else ""
    module = ZOO[zoo](**RELEASED[zoo])[0] if zoo else plain_module(checkpoint)
    called = torch.compile(module) if engine == "torch.compile" else module

    def call(feeds: dict[str, Any]) -> Any:
        with torch.inference_mode():
            given = {name: torch.from_numpy(value) for name, value in feeds.items()}
            return (called(**given) if zoo else called(*given.values())).numpy()

    return call


def _load_graph(graph: str, engine: str, threads: int, precision: str | None) -> Call:
    if engine == "ort":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return lambda feeds: session.run(None, feeds)[0]
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads} | ({"INFERENCE_PRECISION_HINT": "f32"} if precision == "fp32" else {})
    model = openvino.Core().compile_model(graph, "CPU", settings)
    return lambda feeds: model(feeds)[0]
