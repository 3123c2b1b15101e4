# SPDX-License-Identifier: Apache-2.0
"""Compiling a graph with TensorRT, and holding the engine to the precision that was asked for."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.runtimes.engines.backend import Platform, Progress, Source
from perceiver_export.runtimes.engines.cuda_driver import driver_version
from perceiver_export.runtimes.engines.interruptible import interruptible
from perceiver_export.runtimes.engines.tensorrt_caches import read_timings, write_timings
from perceiver_export.runtimes.engines.tensorrt_capabilities import Capabilities
from perceiver_export.runtimes.engines.tensorrt_layers import (
    Layer,
    count_attentions,
    count_precisions,
    differences,
    layers_from_inspector,
    layers_from_log,
)
from perceiver_export.runtimes.engines.tensorrt_network import (
    asked_precisions,
    check_shared_weights,
    check_types,
    constrain,
    parse,
    weight_bytes,
)
from perceiver_export.runtimes.errors import BuildError, DeviceError

ENGINE, REPORT = "model.engine", "layers.json"
_ERROR = 1  # severities count down to 0, an internal error
_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class LayerReport(msgspec.Struct, frozen=True):
    """layers.json beside an engine: what its own report says. ``precisions`` counts the matrix products by type;
    ``weight_bytes`` are those of the graph's constants, ``bytes_each_use`` with a copy for each layer that uses one.
    """

    layers: int
    fused_attentions: int
    int8_products: int
    precisions: dict[str, int]
    engine_bytes: int
    weight_bytes: int
    bytes_each_use: int


def make_logger(trt: Any) -> Any:
    """A logger that keeps what went wrong, and the lines in which TensorRT for RTX lists its layers."""

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
    """TensorRT's builder or runtime, which both start CUDA. Raises DeviceError: CUDA does not start for them."""
    try:
        return factory(logger)
    except TypeError as error:  # what its bindings make of a null pointer
        raise DeviceError(
            f"{name} does not start: {' '.join(logger.problems[:1]) or 'it gives no reason'}",
            f"it may want a newer driver, or GPU memory that others hold: the driver runs CUDA {driver_version()};"
            " perceiver-export doctor shows the rest",
        ) from error


def rtx_gpus(trt: Any) -> list[str]:
    """The GPUs that TensorRT for RTX builds for: `sm86`, the oldest first."""
    names = [name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    return sorted(names, key=lambda name: int(name.removeprefix("sm")))


def build_engine(
    trt: Any, can: Capabilities, platform: Platform, source: Source, directory: Path, progress: Progress
) -> LayerReport:
    """Compile ``source`` and write the engine with its report.

    Raises BuildError: the compiler gave up, or the engine's layers are not of the precision that was asked for (they
    are named); BundleError: the graph cannot be read; DeviceError; KeyboardInterrupt, once the compiler has stopped.
    """
    return interruptible(
        lambda stop: _build(trt, can, platform, source, directory, progress, stop),
        lambda: progress("stopping", 0, None),
    )


def _build(
    trt: Any,
    can: Capabilities,
    platform: Platform,
    source: Source,
    directory: Path,
    progress: Progress,
    stop: threading.Event,
) -> LayerReport:
    logger = make_logger(trt)
    builder = start(trt.Builder, logger, can.name)
    progress("reading the graph", 0, None)
    network, parser = parse(trt, can, builder, logger, source.graph)
    config = builder.create_builder_config()
    _configure(trt, can, config, builder, source)
    if can.typing == "weak":
        constrain(trt, network, config, source.options.precision)
    asked = asked_precisions(trt, network, can, source.options)
    check_types(asked, source)
    check_shared_weights(trt, network, can, source.graph)
    timings = read_timings(platform, config) if can.library == "tensorrt" else None
    if can.monitor:
        config.progress_monitor = _monitor(trt, progress, stop)
    weights = weight_bytes(trt, network)
    once, each = (round(size / 2**20) for size in weights)
    progress(f"compiling {once} MiB of weights{f', {each} if each use has a copy' if each > once else ''}", 0, None)
    serialized = builder.build_serialized_network(network, config)
    del parser  # it owns weights that the network refers to
    if serialized is None:
        raise _given_up(can, source, logger.problems)
    if timings is not None:
        write_timings(timings, config)
    layers = _layers(trt, can, logger, serialized)
    wrong = differences(asked, layers)
    if wrong:
        named = "; ".join(str(one) for one in wrong[:5])
        raise BuildError(
            f"{len(wrong)} of {len(asked)} products do not run as asked: {named}{'; …' if len(wrong) > 5 else ''}",
            "report it with the versions that `perceiver-export doctor` shows; another --precision may be kept",
        )
    return _write(asked, layers, weights, serialized, directory)


def _configure(trt: Any, can: Capabilities, config: Any, builder: Any, source: Source) -> None:
    flags = dict(source.options.flags)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if source.options.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # it has 10 bits where fp32 has 23
    if "workspace" in flags:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _bytes(flags.pop("workspace")))
    if "optimization_level" in flags:
        config.builder_optimization_level = _level(flags.pop("optimization_level"))
    targets = flags.pop("compute_capability", "")
    if targets:
        _set_targets(trt, can, config, targets)
    if flags:
        raise BuildError(
            f"{source.target} has no flag {next(iter(flags))!r}",
            "its flags: workspace=512MiB, optimization_level=0…5; tensorrt-rtx: compute_capability=sm86,sm89",
        )
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
    if can.library != "tensorrt-rtx":
        raise BuildError(
            "TensorRT builds for the GPU that it runs on", "leave compute_capability out, and build on the device"
        )
    names = list(dict.fromkeys(name.strip().upper() for name in targets.split(",")))
    known = rtx_gpus(trt)
    for name in names:
        if name.lower() not in known:
            raise DeviceError(f"{can.name} does not build for {name!r}", f"it builds for {', '.join(known)}")
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def _monitor(trt: Any, progress: Progress, stop: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Progress of the outermost phases; TensorRT stops where a step gives False."""

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
    said = problems[0] if problems else "it gives no reason"
    version = f"{can.version[0]}.{can.version[1]}"
    hint = (
        f"perceiver-export lint {source.graph.parent} --target {can.library} --version {version} says what does not fit"
    )
    if re.search(r"SM75\): FP32", " ".join(problems)):
        hint = "leave sm75 out, where TensorRT for RTX has no fp32 products; this graph has some"
    if re.search(r"workspace|OutOfMemory|out of memory", " ".join(problems), re.IGNORECASE):
        hint = "give it more memory: --flag workspace=2GiB, or leave it out; and close what else uses the GPU"
    return BuildError(f"{can.name} could not compile {source.graph.name}: {said}", hint)


def _layers(trt: Any, can: Capabilities, logger: Any, serialized: Any) -> tuple[Layer, ...]:
    if can.library == "tensorrt-rtx":
        return layers_from_log(logger.layers)
    runtime = start(trt.Runtime, logger, can.name)
    engine = runtime.deserialize_cuda_engine(serialized)
    if engine is None:
        raise BuildError(
            f"{can.name} cannot load what it built: {' '.join(logger.problems[-1:])}", "perceiver-export doctor"
        )
    inspector = engine.create_engine_inspector()
    return layers_from_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _write(
    asked: dict[str, str], layers: tuple[Layer, ...], weights: tuple[int, int], serialized: Any, directory: Path
) -> LayerReport:
    counts = count_precisions(layers, asked)
    with (directory / ENGINE).open("wb") as file:
        file.write(serialized)
    report = LayerReport(
        layers=len(layers),
        fused_attentions=count_attentions(layers),
        int8_products=counts.get("int8", 0),
        precisions=counts,
        engine_bytes=(directory / ENGINE).stat().st_size,
        weight_bytes=weights[0],
        bytes_each_use=weights[1],
    )
    (directory / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,19})\s*([KMG]?)(?:i?B)?", text.strip())
    size = int(found[1]) * _BYTES[found[2]] if found else 0
    if not 0 < size < 2**63:
        raise BuildError(f"workspace is {text!r}", "give bytes: --flag workspace=512MiB")
    return size


def _level(text: str) -> int:
    if text not in "012345" or len(text) != 1:
        raise BuildError(f"optimization_level is {text!r}", "give 0 (fast to build) to 5 (fast to run)")
    return int(text)
