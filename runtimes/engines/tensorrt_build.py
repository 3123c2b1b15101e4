# SPDX-License-Identifier: Apache-2.0
"""Compile a graph with TensorRT, and check that the engine computes in the requested precision."""

from __future__ import annotations

import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from perceiver_export.runtimes.engines import tensorrt_layers
from perceiver_export.runtimes.engines.backend import Platform, Progress, Source
from perceiver_export.runtimes.engines.cuda import driver_version
from perceiver_export.runtimes.engines.tensorrt_versions import Capabilities, read_timings, write_timings
from perceiver_export.runtimes.errors import BuildError, DeviceError
from perceiver_export.runtimes.files import encode_json

ENGINE, REPORT = "model.engine", "layers.json"
_POLL = 0.2  # seconds
_ERROR = 1  # a lower severity is worse: 0 is an internal error
_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class LayerReport(msgspec.Struct, frozen=True):
    """The contents of layers.json: figures from TensorRT's own report.

    ``precisions`` counts matrix products by type. ``weight_bytes`` is the size of the graph's constants;
    ``bytes_each_use`` counts a constant once for each layer that uses it. ``kernels`` is the report itself, which
    engines of older versions lack.
    """

    layers: int
    fused_attentions: int
    int8_products: int
    precisions: dict[str, int]
    engine_bytes: int
    weight_bytes: int
    bytes_each_use: int
    kernels: tuple[tensorrt_layers.Layer, ...] = ()


T = TypeVar("T")


def interruptible(work: Callable[[threading.Event], T], stopping: Callable[[], None]) -> T:
    """Call ``work`` in a thread with an event. Ctrl-C sets the event and then calls ``stopping``.

    In a compiler's callback KeyboardInterrupt would be swallowed or end the process; in the main thread it could leave
    the compiler running. Raises KeyboardInterrupt once ``work`` has stopped, and whatever ``work`` raises.
    """
    stop = threading.Event()
    heard = threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, lambda *_: stop.set()) if heard else None
    try:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work, stop)
            while not wait([future], _POLL).done and not stop.is_set():
                pass
            if stop.is_set():
                stopping()
    finally:
        if heard:
            signal.signal(signal.SIGINT, before)
    if stop.is_set():
        raise KeyboardInterrupt
    return future.result()


def make_logger(trt: Any) -> Any:
    """A logger that keeps errors and the lines in which TensorRT for RTX lists its layers."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.problems: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= _ERROR:
                self.problems.append(" ".join(message.split()))
            elif ", LayerType: " in message:
                self.layers.append(message)

    return Log()


def start(factory: Any, logger: Any, name: str) -> Any:
    """Create TensorRT's builder or runtime, either of which starts CUDA. Raises DeviceError: CUDA does not start."""
    try:
        return factory(logger)
    except TypeError as error:  # the bindings' error for a null pointer
        raise DeviceError(
            f"{name} does not start: {' '.join(logger.problems[:1]) or 'it gives no reason'}",
            f"install a newer driver (this one supports CUDA {driver_version()}), or free GPU memory;"
            " perceiver-export doctor shows more",
        ) from error


def rtx_gpus(trt: Any) -> list[str]:
    """The GPUs for which TensorRT for RTX builds, such as `sm86`, oldest first."""
    names = [name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    return sorted(names, key=lambda name: int(name.removeprefix("sm")))


def build_engine(
    trt: Any, can: Capabilities, platform: Platform, source: Source, directory: Path, progress: Progress
) -> LayerReport:
    """Compile ``source`` and write the engine with its report.

    Raises BuildError: the compiler failed, or the layers that it names do not have the requested precision;
    BundleError: the graph cannot be read; DeviceError; KeyboardInterrupt once the compiler has stopped.
    """

    def work(stop: threading.Event) -> LayerReport:
        logger = make_logger(trt)
        builder = start(trt.Builder, logger, can.name)
        progress("reading the graph", 0, None)
        network, parser = tensorrt_layers.parse(trt, can, builder, logger, source.graph)
        config = builder.create_builder_config()
        _configure(trt, can, config, builder, source)
        asked = tensorrt_layers.asked_precisions(trt, network)
        tensorrt_layers.check_types(asked, source)
        tensorrt_layers.check_shared_weights(trt, network, can, source.graph)
        timings = read_timings(platform, config) if can.library == "tensorrt" else None
        config.progress_monitor = _monitor(trt, progress, stop)
        once, each = tensorrt_layers.weight_bytes(trt, network)
        copied = f" ({each / 2**20:.0f} MiB if each use has its own copy)" if each > once else ""
        progress(f"compiling {once / 2**20:.0f} MiB of weights{copied}", 0, None)
        serialized = builder.build_serialized_network(network, config)
        del parser  # kept until here: it owns weights to which the network refers
        if serialized is None:
            raise _given_up(can, source, logger.problems)
        if timings is not None:
            write_timings(timings, config)
        layers = _layers(trt, can, logger, serialized)
        _check_precisions(asked, tensorrt_layers.precisions(layers))
        (directory / ENGINE).write_bytes(serialized)
        counts = dict(Counter(asked.values()))
        size, attentions = (directory / ENGINE).stat().st_size, sum(layer.fused_attention for layer in layers)
        report = LayerReport(len(layers), attentions, counts.get("int8", 0), counts, size, once, each, layers)
        (directory / REPORT).write_bytes(encode_json(report))
        return report

    return interruptible(work, lambda: progress("stopping", 0, None))


def _check_precisions(asked: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise BuildError if a product's type differs, even if it is narrower: fp32 products may overflow in it."""
    kinds = {node: (kind, found.get(node, "nothing")) for node, kind in asked.items()}
    wrong = [f"{node}: {kind} requested, {other} found" for node, (kind, other) in kinds.items() if kind != other]
    if wrong:
        named = "; ".join(wrong[:5]) + "; …" * (len(wrong) > 5)
        said = f"{len(wrong)} of {len(asked)} products do not run in the requested precision: {named}"
        hint = "try another --precision, and report this with the versions that `perceiver-export doctor` shows"
        raise BuildError(said, hint)


def _configure(trt: Any, can: Capabilities, config: Any, builder: Any, source: Source) -> None:
    flags = source.options.flags
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if source.options.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # its mantissa has 10 bits, that of fp32 has 23
    if "workspace" in flags:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _bytes(flags["workspace"]))
    if "optimization_level" in flags:
        config.builder_optimization_level = int(flags["optimization_level"])
    if targets := flags.get("compute_capability"):
        _set_targets(trt, can, config, targets)
    named = [spec for spec in source.inputs if any(isinstance(size, str) for size in spec.shape)]
    if named:
        profile = builder.create_optimization_profile()
        for spec in named:
            sizes = [
                tuple(source.options.shapes[size][which] if isinstance(size, str) else size for size in spec.shape)
                for which in range(3)
            ]
            profile.set_shape(spec.name, *sizes)
        config.add_optimization_profile(profile)


def _set_targets(trt: Any, can: Capabilities, config: Any, targets: str) -> None:
    names = list(dict.fromkeys(name.strip().upper() for name in targets.split(",")))
    known = rtx_gpus(trt)
    for name in names:
        if name.lower() not in known:
            raise DeviceError(f"{can.name} does not build for {name!r}", f"choose among {', '.join(known)}")
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def _monitor(trt: Any, progress: Progress, stop: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the progress of outermost phases. TensorRT stops when a step returns False."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.sizes: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.sizes[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self.sizes.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            size = self.sizes.get(phase_name)
            if size is not None:
                progress(phase_name, step + 1, size)
            return not stop.is_set()

    return Monitor()


def _given_up(can: Capabilities, source: Source, problems: list[str]) -> BuildError:
    said = " ".join(problems)
    hint = f"run {tensorrt_layers.lint_command(can, source.graph)} to see why"
    if re.search(r"SM75\): FP32", said):
        hint = "omit sm75: TensorRT for RTX has no fp32 products for it, but this graph has some"
    if re.search(r"workspace|OutOfMemory|out of memory", said, re.IGNORECASE):
        hint = "raise or omit --flag workspace=…, and close other programs that use the GPU"
    return BuildError(
        f"{can.name} could not compile {source.graph.name}: {(problems or ['it gives no reason'])[0]}", hint
    )


def _layers(trt: Any, can: Capabilities, logger: Any, serialized: Any) -> tuple[tensorrt_layers.Layer, ...]:
    if can.library == "tensorrt-rtx":
        return tensorrt_layers.layers_from_log(logger.layers)
    runtime = start(trt.Runtime, logger, can.name)
    engine = runtime.deserialize_cuda_engine(serialized)
    if engine is None:
        said = " ".join(logger.problems[-1:])
        raise BuildError(f"{can.name} cannot load its own engine: {said}", "run perceiver-export doctor")
    inspector = engine.create_engine_inspector()
    return tensorrt_layers.layers_from_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,19})\s*([KMG]?)(?:i?B)?", text.strip())
    size = int(found[1]) * _BYTES[found[2]] if found else 0
    if not 0 < size < 2**63:
        raise BuildError(f"workspace={text!r} is out of range", "give a number of bytes: --flag workspace=512MiB")
    return size
