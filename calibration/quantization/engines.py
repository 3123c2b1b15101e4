# SPDX-License-Identifier: Apache-2.0
"""Measures a quantized graph on this machine's engines: the kernels that they run, its outputs and its speed.

Kernels are read from the engine itself. ONNX Runtime writes its optimized graph and a profile of the kernels that it
ran; OpenVINO exposes the model that it runs. Linear layers are found in them by their output tensors, which no
optimizer renames.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from msgspec import structs

from perceiver_export.calibration.data.calls import Call
from perceiver_export.calibration.graphs import open_session, read_graph, run_session, sqnr
from perceiver_export.calibration.quantization.linears import Linear
from perceiver_export.calibration.quantization.record import Coverage, Layer, OutputEffect, Speed
from perceiver_export.runtimes.engines.backend import EngineOptions, Kernel, find_target
from perceiver_export.runtimes.engines.cache import graph_for
from perceiver_export.runtimes.engines.openvino_engine import OpenvinoEngine
from perceiver_export.runtimes.engines.tensorrt_build import REPORT, LayerReport
from perceiver_export.runtimes.errors import DeviceError, GateError
from perceiver_export.runtimes.files import read_json
from perceiver_export.runtimes.manifest import DType, Manifest, OutputKind, Part, TensorSpec
from perceiver_export.runtimes.opening import open_engine
from perceiver_export.runtimes.runtime import Array, Feeds, quartiles, scattered

_ROUNDS, _LEAST, _MOST = 7, 1.0, 30.0  # of timing: minimum rounds and seconds; no round starts after the maximum
_FEWEST = 3  # rounds needed for a comparison
_ORT_INTEGER = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "MatMulInteger", "DynamicQuantizeMatMul"})
_ORT_BLOCKED = "_nchwc"  # suffix of a node that got the blocked layout of convolutions
_ORT_TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "int8", "int8": "int8"}


MISSING = Kernel((), "not found in the engine", "", False, 0)


class Timing(NamedTuple):
    """How often a graph is run: once, or for ``seconds`` after a first call with cold caches."""

    seconds: float = 0.0
    threads: int | None = None

    def calls(self) -> Iterator[int]:
        """Counts the calls."""
        start, most = time.perf_counter(), 1000 if self.seconds else 1
        for count in range(most):
            if count > 1 and time.perf_counter() - start > (self.seconds if count > _ROUNDS else _MOST):
                return
            yield count


_PLAIN, _ONCE = EngineOptions(), Timing()
Kernels = tuple[str, list[Kernel]]  # the engine's name and its kernels
Reading = Generator[None, None, Kernels]  # pauses after compiling the graph, and before each call


def targets() -> list[str]:
    """The targets whose kernels can be read and whose library is installed."""
    return [target for target, (library, _) in _KERNELS.items() if importlib.util.find_spec(library) is not None]


def graphs_for(target: str, parts: Mapping[str, Part], directory: Path) -> dict[str, Path]:
    """The graph of each part that this machine runs for a target."""
    return {name: directory / graph_for(part, target, "fp32") for name, part in parts.items()}


def measure_coverage(target: str, path: Path, linears: Sequence[Linear], feeds: Feeds) -> Coverage:
    """Open the graph at ``path`` on the target, run it on ``feeds``, and list the kernels of its linear layers.

    Raises BundleError if the engine rejects the graph.
    """
    engine, found = read_kernels(target, path, feeds)
    layers = []
    for linear in linears:
        # An engine keeps the product under one of these: its tensor, its bias's tensor, its node.
        names = (linear.node.outputs[0].name, linear.output.name, linear.node.name)
        known = (one for name in names for one in found if name in one.names)
        kernel = max(known, key=lambda one: one.product, default=MISSING)  # nodes fused into a product bear its name
        integer = kernel.product and kernel.precision == "int8"
        layers.append(Layer(linear.name, linear.group, linear.macs, kernel.kernel, integer))
    return Coverage(target, engine, tuple(layers))


def read_kernels(
    target: str, path: Path, feeds: Feeds, options: EngineOptions = _PLAIN, how: Timing = _ONCE
) -> Kernels:
    """The engine's name and the kernels that it runs for a graph, in running order, timed in each of several calls.

    Raises BundleError if the engine rejects the graph, DeviceError if the target does not report its kernels.
    """
    return read_in_turn([reading(target, path, feeds, options, how)])[0]


def read_in_turn(readings: Iterable[Reading]) -> list[Kernels]:
    """The kernels of several graphs. Their calls alternate, so that other work on the machine slows all of them."""
    found: dict[int, Kernels] = {}
    left = dict(enumerate(readings))
    while left:
        for index, one in list(left.items()):
            try:
                next(one)
            except StopIteration as ended:
                found[index] = ended.value
                del left[index]
    return [found[index] for index in sorted(found)]


def reading(target: str, path: Path, feeds: Feeds, options: EngineOptions, how: Timing) -> Reading:
    """`read_kernels` for `read_in_turn`."""
    if target not in _KERNELS:
        raise DeviceError(f"the kernels of {target} cannot be read", f"profile on {' or '.join(_KERNELS)}")
    return _KERNELS[target][1](path, feeds, options, how)


def totals(kernels: Sequence[Kernel]) -> Array:
    """Milliseconds of each call except the first, which runs with cold caches."""
    times = [one.times for one in kernels if one.times]
    if not times:
        return np.zeros(1)
    total = np.sum([one[: min(map(len, times))] for one in times], axis=0)
    return np.asarray(total[1:] if len(total) > 1 else total)


def built_kernels(directory: Path) -> list[Kernel]:
    """The kernels of a TensorRT engine, from the report of its build, which has no times or bytes.

    Raises BundleError if the report cannot be read.
    """
    report = read_json(directory / REPORT, LayerReport, hint="build it again with --force")
    return [
        Kernel(tuple(sorted(one.nodes)), one.kind.strip() or one.name, one.precision, one.multiplies, 0)
        for one in report.kernels
    ]


def _ort_kernels(path: Path, feeds: Feeds, options: EngineOptions, how: Timing) -> Reading:
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        optimized = Path(directory) / "optimized.onnx"
        config = {
            **options.flags,
            "optimized_model_filepath": str(optimized),
            "session.optimized_model_external_initializers_file_name": "optimized.weights",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            "enable_profiling": True,
            "profile_file_prefix": str(Path(directory) / "profile"),
        }
        model = read_graph(path)
        for node in model.graph:  # the profile knows kernels by name
            node.name = node.name or node.outputs[0].name
        session = open_session(model, path.parent, how.threads, config, in_order=True)
        yield
        for _ in how.calls():
            yield
            session.run(None, dict(feeds))
        ran: dict[str, list[dict[str, Any]]] = {}
        for event in json.loads(Path(session.end_profiling()).read_bytes()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                ran.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event)
        del session  # only the files that it wrote are needed now
        graph = read_graph(optimized).graph
        kernels, names, seen = [], Counter(node.name for node in graph), Counter[str | None]()
        for node in graph:  # fused nodes may share a name: each call runs all of them, in this order
            events = ran.get(node.name or "", [])[seen[node.name] :: names[node.name]]
            seen[node.name] += 1
            values = (*(str(value.name) for value in node.outputs), str(node.name).removesuffix(_ORT_BLOCKED))
            kernels.append(_ort_kernel(node.op_type, values, events))
    return f"onnxruntime {onnxruntime.__version__}", kernels


def _ort_kernel(op_type: str, names: tuple[str, ...], events: Sequence[Mapping[str, Any]]) -> Kernel:
    said = events[0]["args"] if events else {}
    op = str(said.get("op_name", op_type))
    types = [name for one in said.get("input_type_shape", ()) for name in one]
    precision = "int8" if op in _ORT_INTEGER else next((_ORT_TYPES[name] for name in types if name in _ORT_TYPES), "")
    moved = sum(int(said.get(size, 0)) for size in ("activation_size", "parameter_size", "output_size"))
    product = op in _ORT_INTEGER or "MatMul" in op or "Gemm" in op or "Conv" in op or "Attention" in op
    return Kernel(names, op, precision, product, moved, tuple(event["dur"] / 1e3 for event in events))


def _openvino_kernels(path: Path, feeds: Feeds, options: EngineOptions, how: Timing) -> Reading:
    options = structs.replace(options, flags={**options.flags, "PERF_COUNT": "YES"})
    inputs = tuple(TensorSpec(name, cast("DType", str(array.dtype)), array.shape) for name, array in feeds.items())
    engine = cast(OpenvinoEngine, open_engine(path, "openvino-cpu", how.threads, options, inputs))
    times = []
    yield
    for _ in how.calls():
        yield
        engine.run(feeds)
        times.append(engine.kernel_times())
    kernels = [one._replace(times=tuple(call.get(name, 0.0) for call in times)) for name, one in engine.kernels()]
    return f"openvino {engine.describe()['version'].partition('-')[0]}", kernels


_KERNELS: dict[str, tuple[str, Callable[[Path, Feeds, EngineOptions, Timing], Reading]]] = {
    "ort-cpu": ("onnxruntime", _ort_kernels),
    "openvino-cpu": ("openvino", _openvino_kernels),
}


def measure_effects(
    manifest: Manifest, graphs: Mapping[str, Path], calls: Sequence[Call], threads: int | None
) -> tuple[OutputEffect, ...]:
    """SQNR and agreement of each output with fp32's, on ONNX Runtime. Decoders read the quantized encoder's latents."""
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
        OutputEffect(name, sqnr(*pair), _agreement(kinds.get(name, "none"), *pair), len(pair[0]))
        for name, pair in sides.items()
    )


def _agreement(kind: OutputKind, exact: Array, found: Array) -> float | None:
    if kind == "single-label":
        return float((exact.argmax(-1) == found.argmax(-1)).mean())
    return float(((exact > 0) == (found > 0)).all(axis=-1).mean()) if kind == "multi-label" else None


def measure_speed(
    target: str, fp32: Mapping[str, Path], quantized: Mapping[str, Path], scheme: str, call: Call, threads: int | None
) -> Speed:
    """Median milliseconds of a call of all parts: fp32, quantized, and both in lower precisions, timed alternately.

    A lower precision that the engine cannot compile is left out.

    Raises GateError if a quantized part gives NaN or infinite values, as some engines' kernels do.
    """
    sides = {}
    for precision in ("fp32", *find_target(target).backend().precisions(target)):
        options = EngineOptions(precision=precision)
        for own, graphs in (("fp32", fp32), (scheme, quantized)):
            # In fp16, OpenVINO 2026.4 cannot compile int8 queries without a bias.
            with contextlib.suppress(*() if precision == "fp32" else (DeviceError,)):
                opened = {name: open_engine(path, target, threads, options) for name, path in graphs.items()}
                sides[_named(own, precision)] = opened
    for name, engine in sides[scheme].items():
        for output, values in engine.run(call.feeds[name]).items():
            if not np.isfinite(values).all():
                raise GateError(
                    f"the quantized model's {output!r} holds NaN or infinite values on {target}",
                    "try another --scheme, or --keep-float for some layers; fp32 gives finite values",
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
    found = dict(zip(sides, np.transpose(times[1:]), strict=True))  # the first round runs with cold caches
    medians = {name: float(np.median(one)) for name, one in found.items()}
    best = tuple(
        min((name for name in medians if name.startswith(scheme) == quantized), key=medians.__getitem__)
        for quantized in (False, True)
    )
    ratios = quartiles(found[best[1]] / found[best[0]])
    why = next(filter(None, (_varying(name, found[name]) for name in best)), "")
    why = why if len(times) > _FEWEST else f"fewer than {_FEWEST} rounds fit in {_MOST:g} s"
    return Speed(target, medians.pop("fp32"), medians.pop(scheme), medians, (best[0], best[1]), ratios, why)


def _varying(name: str, times: Array) -> str:
    """Why these times, in milliseconds, are too unsteady to compare; empty if they are not."""
    low, median, high = quartiles(times)
    vary = scattered(name, low, median, high)
    return f"they vary too much (the middle half of {name}'s: {low:.3g} to {high:.3g} ms)" if vary else ""


def _named(own: str, precision: str) -> str:
    """`bf16` or `int8 with bf16`, as an engine describes itself."""
    return own if precision == "fp32" else precision if own == "fp32" else f"{own} with {precision}"


def by_target(coverage: Mapping[str, Sequence[Coverage]]) -> dict[str, Coverage]:
    """The kernels of all parts by target; ``coverage`` is by part."""
    found: dict[str, Coverage] = {}
    for one in itertools.chain(*coverage.values()):
        earlier = found[one.target].layers if one.target in found else ()
        found[one.target] = structs.replace(one, layers=earlier + one.layers)
    return found


def require_coverage(coverage: Mapping[str, Coverage], least: float) -> None:
    """Raise GateError if less than ``least`` percent of a target's int8 multiply-adds run in integer kernels."""
    for target, one in coverage.items():
        found = one.share
        if 100 * found < least - 1e-9:
            slow = sorted((layer for layer in one.layers if not layer.integer), key=lambda layer: -layer.macs)
            names = ", ".join(f"{layer.name} ({layer.kernel})" for layer in slow[:3])
            enough = int(100 * found) if found >= 0.02 else 0  # the option reads a number up to 1 as a share
            raise GateError(
                f"only {100 * found:.2f} % of multiply-adds run in integer kernels on {target} ({least:g} % required)",
                f"accept it with --min-coverage {enough}, or name the float layers in --keep-float: {names}",
            )
