# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on Intel's (and any x86 or ARM) CPU, its GPU and its NPU.

What is compiled is the plugin's own form of the model, as it exports it. Arithmetic is what was asked for: left to
itself OpenVINO computes an fp32 model in bf16 where the CPU has it, and in fp16 on a GPU.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.runtimes.engines.backend import EngineOptions, Platform, Precision, Progress, Source, exact
from perceiver_export.runtimes.engines.openvino_requests import OpenvinoEngine
from perceiver_export.runtimes.engines.targets import find_target
from perceiver_export.runtimes.errors import BundleError, DeviceError, EngineError, MissingDependencyError
from perceiver_export.runtimes.machine import cpu_features

differences = exact

_BLOB = "model.blob"
_DEVICES = {"openvino-cpu": "CPU", "openvino-gpu": "GPU", "openvino-npu": "NPU"}
_ARITHMETIC: dict[Precision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_LACKS = "perceiver-export doctor says what this device lacks"
_HINTS = {"latency": "LATENCY", "throughput": "THROUGHPUT"}


def platform(target: str, options: EngineOptions) -> Platform:
    """What is here. Raises MissingDependencyError; DeviceError: no such device, or not in that precision."""
    openvino, device = _import(target), _DEVICES[target]
    core = _core()
    if device not in {name.partition(".")[0] for name in core.available_devices}:
        raise DeviceError(
            f"OpenVINO finds no {device} here, only {', '.join(core.available_devices) or 'nothing'}",
            f"perceiver-export doctor says what the {device} lacks",
        )
    capabilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if options.precision == "bf16" and "BF16" not in capabilities:
        raise DeviceError(f"the {device} has no bf16, it has {', '.join(capabilities)}", "leave --precision out")
    return Platform(
        library="openvino",
        version=openvino.__version__,
        device=core.get_property(device, "FULL_DEVICE_NAME"),
        driver=_driver(core, device),
        features=cpu_features() if device == "CPU" else (),
    )


def compile(source: Source, directory: Path, progress: Progress) -> None:
    """Compile and export. With fp16 weights are stored in half the bytes. Raises BundleError, DeviceError."""
    progress("compiling", 0, None)
    compiled = _compiled(source, None)
    with _translated(f"{source.target} could not export its model", DeviceError):
        blob = compiled.export_model()
    (directory / _BLOB).write_bytes(blob if isinstance(blob, bytes) else blob.getbuffer())


def open(source: Source, directory: Path | None, threads: int | None) -> OpenvinoEngine:
    """A compiled model. Raises BundleError (not a usable graph), EngineError, DeviceError."""
    openvino = _import(source.target)
    blob = None
    if directory is None:
        compiled = _compiled(source, threads)
    else:
        with _translated(f"the engine in {directory} cannot be opened", EngineError, _rebuild(source.target)):
            # Mapped, because plugins go on reading weights from the memory that they import: it lives with the engine.
            blob = openvino.Tensor(np.memmap(directory / _BLOB, np.uint8, mode="c"), shared_memory=True)
            compiled = _core().import_model(blob, _DEVICES[source.target], _properties(source, threads))
    return OpenvinoEngine(openvino, compiled, source, threads, blob)


def _compiled(source: Source, threads: int | None) -> Any:
    openvino, core = _import(source.target), _core()
    if not source.graph.is_file():
        raise BundleError(f"{source.graph} does not exist", "give the path of an ONNX file")
    with _translated(f"{source.graph} cannot be loaded", BundleError, "the file is damaged: copy or export it again"):
        model = core.read_model(str(source.graph))
    if source.options.precision == "fp16":
        model = _with_half_weights(openvino, core, model)
    flags = source.options.flags
    with _translated(
        f"{source.target} refuses {source.graph.name}",
        DeviceError,
        f"leave --flag {', --flag '.join(flags)} out" if flags else _LACKS,
    ):
        return core.compile_model(model, _DEVICES[source.target], _properties(source, threads))


def _with_half_weights(openvino: Any, core: Any, model: Any) -> Any:
    """The model with the weights of its linears in fp16, decompressed where they are used."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=True)
        model = core.read_model(path).clone()
    for node in model.get_ops():
        if node.get_type_name() != "Convert" or node.input_value(0).get_node().get_type_name() != "Constant":
            continue
        uses = [(use.get_node().get_type_name(), use.get_index()) for use in node.output(0).get_target_inputs()]
        # Only weights: a MatMul whose first input is such a constant (a Perceiver's constant queries) gives another
        # answer at each call, as OpenVINO 2026.4 decompresses it into memory that it then uses for something else.
        if any(use != ("MatMul", 1) for use in uses):
            whole = node.input_value(0).get_node().data.astype(np.float32)
            node.output(0).replace(openvino.op.Constant(whole).output(0))
    return model


def _properties(source: Source, threads: int | None) -> dict[str, Any]:
    # A CPU that has no fp16 arithmetic still halves the weights' memory; there the sums stay fp32.
    precision = source.options.precision
    device = _DEVICES[source.target]
    halves = device != "CPU" or "FP16" in _core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    properties: dict[str, Any] = {"PERFORMANCE_HINT": _HINTS[source.options.hint]}
    if device != "NPU":  # which computes in fp16 and int8 only
        properties["INFERENCE_PRECISION_HINT"] = _ARITHMETIC[precision if precision != "fp16" or halves else "fp32"]
    if threads is not None and device == "CPU":
        properties["INFERENCE_NUM_THREADS"] = threads
    return {**properties, **source.options.flags}


@functools.cache
def _core() -> Any:
    return _import("openvino-cpu").Core()


def _import(target: str) -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            f"target {target} needs openvino, which is not installed", find_target(target).install
        ) from error
    return openvino


def _driver(core: Any, device: str) -> str:
    for name in ("GPU_DRIVER_VERSION", "NPU_DRIVER_VERSION"):
        if name in core.get_property(device, "SUPPORTED_PROPERTIES"):
            return str(core.get_property(device, name))
    return ""


def _rebuild(target: str) -> str:
    return f"rebuild it: perceiver-export build BUNDLE --target {target} --force"


@contextmanager
def _translated(
    what: str,
    kind: type[BundleError | DeviceError | EngineError],
    hint: str = _LACKS,
) -> Iterator[None]:
    """OpenVINO raises RuntimeError for everything, so the place decides what it means."""
    try:
        yield
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line and not line.startswith("Exception from")]
        raise kind(f"{what}: {lines[0] if lines else error}", hint) from error
