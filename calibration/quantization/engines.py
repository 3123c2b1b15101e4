# SPDX-License-Identifier: Apache-2.0
"""Measures a quantized graph on this machine's engines: the kernels that they run, its outputs and its speed.

Kernels are read from the engine itself. ONNX Runtime writes the graph that it optimized and a profile of the kernels
that it ran; OpenVINO hands out the model that it runs. Linears are found in them by their output tensors, which no
optimizer renames.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from perceiver_export.calibration.graphs import open_session, read_graph, run_session, sqnr
from perceiver_export.calibration.quantization.linears import Linear
from perceiver_export.calibration.quantization.record import Coverage, Layer, OutputEffect, Speed, share
from perceiver_export.calibration.quantization.statistics import Call
from perceiver_export.runtimes.benchmark import quartiles
from perceiver_export.runtimes.engines.backend import find_target
from perceiver_export.runtimes.engines.cache import graph_for
from perceiver_export.runtimes.engines.openvino_engine import OpenvinoEngine
from perceiver_export.runtimes.errors import GateError
from perceiver_export.runtimes.manifest import Manifest, OutputKind, Part
from perceiver_export.runtimes.opening import open_engine
from perceiver_export.runtimes.runtime import Array, Feeds

_ROUNDS, _LEAST, _MOST = 7, 1.0, 30.0  # of timing: rounds and seconds that are done, and seconds after which it ends
_ORT_INTEGER = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "MatMulInteger", "DynamicQuantizeMatMul"})
_DEQUANTIZATION = "/DequantizationMultiply"  # OpenVINO's suffix of a product whose scales it moved behind it

Kernels = dict[str, tuple[str, bool]]  # by tensor or node: the kernel's name, and whether it multiplies integers


def targets() -> list[str]:
    """The targets whose kernels can be read and whose library is installed."""
    return [target for target, (library, _) in _KERNELS.items() if importlib.util.find_spec(library) is not None]


def graphs_for(target: str, parts: Mapping[str, Part], directory: Path) -> dict[str, Path]:
    """The graph of each part that this machine runs for a target."""
    return {name: directory / graph_for(part, target, "fp32") for name, part in parts.items()}


def measure_coverage(target: str, path: Path, linears: Sequence[Linear], feeds: Feeds) -> Coverage:
    """Open the graph at ``path`` on the target, run it on ``feeds`` where the engine needs that, and list its kernels.

    Raises BundleError: the engine refuses the graph.
    """
    engine, kernels = _KERNELS[target][1](path, feeds)
    layers = []
    for linear in linears:
        # An engine keeps the product under one of these: its tensor, its bias's tensor, its node.
        names = (linear.node.outputs[0].name, linear.output.name, linear.node.name)
        found = next((kernels[str(name)] for name in names if name in kernels), ("not found in the engine", False))
        layers.append(Layer(linear.name, linear.group, linear.macs, *found))
    return Coverage(target, engine, tuple(layers))


def _ort_kernels(path: Path, feeds: Feeds) -> tuple[str, Kernels]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        optimized = Path(directory) / "optimized.onnx"
        config = {
            "optimized_model_filepath": str(optimized),
            "session.optimized_model_external_initializers_file_name": "optimized.weights",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            "enable_profiling": True,
            "profile_file_prefix": str(Path(directory) / "profile"),
        }
        session = open_session(read_graph(path), path.parent, config=config, in_order=True)
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_bytes())
        del session  # only the files that it wrote are needed now
        ran = {
            event["name"].removesuffix("_kernel_time"): event["args"]["op_name"]
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        }
        kernels: Kernels = {}
        for node in read_graph(optimized).graph:
            op = ran.get(node.name or "", node.op_type)
            kernels |= {str(value.name): (op, op in _ORT_INTEGER) for value in node.outputs}
    return f"onnxruntime {onnxruntime.__version__}", kernels


def _openvino_kernels(path: Path, feeds: Feeds) -> tuple[str, Kernels]:
    engine = cast(OpenvinoEngine, open_engine(path, "openvino-cpu", None))
    kernels: Kernels = {}
    for one in engine.kernels():
        kernel = (f"{one.layer} {one.primitive}", one.is_product and one.precision == "int8")
        for name in (name.removesuffix(_DEQUANTIZATION) for name in one.nodes):
            if one.is_product or name not in kernels:  # nodes that were fused into a product bear its name
                kernels[name] = kernel
    return f"openvino {engine.describe()['version'].partition('-')[0]}", kernels


_KERNELS: dict[str, tuple[str, Callable[[Path, Feeds], tuple[str, Kernels]]]] = {
    "ort-cpu": ("onnxruntime", _ort_kernels),
    "openvino-cpu": ("openvino", _openvino_kernels),
}


def measure_effects(
    manifest: Manifest, graphs: Mapping[str, Path], calls: Sequence[Call], threads: int | None
) -> tuple[OutputEffect, ...]:
    """SQNR and agreement of every output with fp32, on ONNX Runtime. Decoders read the quantized encoder's latents."""
    sessions = {
        name: open_session(read_graph(path), path.parent, threads, in_order=True) for name, path in graphs.items()
    }
    found: dict[str, list[tuple[Array, Array]]] = {}
    for call in calls:
        latents: dict[str, Array] = {}
        for name, feeds in call.feeds.items():
            outputs = run_session(sessions[name], {**feeds, **{key: latents[key] for key in feeds if key in latents}})
            if name == "encoder":
                latents = outputs
            for output, exact in call.outputs[name].items():
                found.setdefault(output, []).append((exact, outputs[output]))
    kinds: dict[str, OutputKind] = dict(manifest.output_kinds)
    if manifest.task == "fill-mask":
        kinds = dict.fromkeys(kinds, "single-label")  # one token at each position
    sides = {name: [np.concatenate(side) for side in zip(*pairs, strict=True)] for name, pairs in found.items()}
    return tuple(
        OutputEffect(name, sqnr(*pair), _agreement(kinds.get(name, "none"), *pair)) for name, pair in sides.items()
    )


def _agreement(kind: OutputKind, exact: Array, found: Array) -> float | None:
    if kind == "single-label":
        return float((exact.argmax(-1) == found.argmax(-1)).mean())
    return float(((exact > 0) == (found > 0)).all(axis=-1).mean()) if kind == "multi-label" else None


def measure_speed(
    target: str, fp32: Mapping[str, Path], quantized: Mapping[str, Path], scheme: str, call: Call, threads: int | None
) -> Speed:
    """Median milliseconds of a call of all parts; fp32, quantized and both in lower precisions take turns.

    Raises GateError where a quantized part gives NaN or infinite values: some engines have kernels that do.
    """
    sides = {
        _named(own, precision): {name: open_engine(path, target, threads, precision) for name, path in graphs.items()}
        for precision in ("fp32", *find_target(target).backend().precisions(target))
        for own, graphs in (("fp32", fp32), (scheme, quantized))
    }
    for name, engine in sides[scheme].items():
        for output, values in engine.run(call.feeds[name]).items():
            if not np.isfinite(values).all():
                raise GateError(
                    f"the quantized model's {output!r} holds NaN or infinite values on {target}",
                    "fp32 gives none: try another --scheme, or --keep-float for some layers",
                )
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - start < (_MOST if len(times) <= _ROUNDS else _LEAST):
        times.append([])
        for engines in sides.values():
            begin = time.perf_counter()
            for name, engine in engines.items():
                engine.run(call.feeds[name])
            times[-1].append((time.perf_counter() - begin) * 1e3)
    found = dict(zip(sides, np.transpose(times[1:]), strict=True))  # the first round finds cold caches
    medians = {name: float(np.median(one)) for name, one in found.items()}
    best = tuple(
        min((name for name in medians if name.startswith(scheme) == quantized), key=medians.__getitem__)
        for quantized in (False, True)
    )
    ratios = quartiles(found[best[1]] / found[best[0]])
    return Speed(target, medians.pop("fp32"), medians.pop(scheme), medians, (best[0], best[1]), ratios)


def _named(own: str, precision: str) -> str:
    """`bf16`, `int8 with bf16`; as an engine describes itself."""
    return own if precision == "fp32" else precision if own == "fp32" else f"{own} with {precision}"


def shares(coverage: Mapping[str, Sequence[Coverage]]) -> dict[str, float]:
    """By target, the share of the multiply-adds of all parts that run in integer kernels."""
    return {target: share(layers) for target, layers in _by_target(coverage).items()}


def _by_target(coverage: Mapping[str, Sequence[Coverage]]) -> dict[str, list[Layer]]:
    layers: dict[str, list[Layer]] = {}
    for one in (one for part in coverage.values() for one in part):
        layers.setdefault(one.target, []).extend(one.layers)
    return layers


def require_coverage(coverage: Mapping[str, Sequence[Coverage]], least: float) -> None:
    """Raise GateError where less than ``least`` percent of the int8 multiply-adds run in integer kernels."""
    for target, layers in _by_target(coverage).items():
        found = share(layers)
        if 100 * found < least - 1e-9:
            slow = sorted((one for one in layers if not one.integer), key=lambda one: -one.macs)
            names = ", ".join(f"{layer.name} ({layer.kernel})" for layer in slow[:3])
            enough = int(100 * found) if found >= 0.02 else 0  # the option takes a number up to 1 for a share
            raise GateError(
                f"{100 * found:.2f} % of multiply-adds run in integer kernels on {target}, {least:g} % were asked for",
                f"in float: {names}; accept it with --min-coverage {enough}, or name them in --keep-float",
            )
