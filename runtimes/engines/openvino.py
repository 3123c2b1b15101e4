# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on x86 and ARM CPUs, and on Intel's GPUs and NPUs.

The engine is the model as the plugin exports it. By default OpenVINO computes an fp32 model in bf16 if the CPU supports
bf16 and in fp16 on a GPU, and with 8-bit weights it converts activations to int8 if the CPU has VNNI. Here it computes
in the precision of the build. With fp16, every CPU stores weights in fp16, and CPUs with AVX512-FP16 or similar also
compute in fp16: `OpenvinoEngine.describe` reports the types in use.
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
from perceiver_export.runtimes.engines.flags import NUMBER, YES_NO, Flags, Values, one_of, without_openvinos
from perceiver_export.runtimes.engines.openvino_engine import DEVICES, OpenvinoEngine, first_line
from perceiver_export.runtimes.errors import BuildError, BundleError, DeviceError, EngineError, require
from perceiver_export.runtimes.files import FIRST_USE
from perceiver_export.runtimes.machine import cpu_features

differences = exact

_BLOB = "model.blob"
_ARITHMETIC: dict[Precision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
# Keeps an fp32 model in fp32 on every CPU.
CPU_ARITHMETIC: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
_LACKS = "run `perceiver-export doctor` to see what this device lacks"
_PRIORITY = one_of("LOW", "MEDIUM", "HIGH")
_FLAGS: dict[str, Flags] = {
    "CPU": {
        "NUM_STREAMS": Values("AUTO|NUMA|[0-9]{1,4}", "AUTO, NUMA or a number"),
        "INFERENCE_NUM_THREADS": NUMBER,
        "PERFORMANCE_HINT_NUM_REQUESTS": NUMBER,
        "EXECUTION_MODE_HINT": one_of("PERFORMANCE", "ACCURACY"),
        "ENABLE_CPU_PINNING": YES_NO,
        "ENABLE_CPU_RESERVATION": YES_NO,
        "ENABLE_HYPER_THREADING": YES_NO,
        "SCHEDULING_CORE_TYPE": one_of("ANY_CORE", "PCORE_ONLY", "ECORE_ONLY"),
        "CPU_DENORMALS_OPTIMIZATION": YES_NO,
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": Values(r"[01]|0\.[0-9]{1,6}|1\.0", "a share from 0 to 1"),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": NUMBER,
    },
    "GPU": {
        "NUM_STREAMS": Values("AUTO|[0-9]{1,4}", "AUTO or a number"),
        "PERFORMANCE_HINT_NUM_REQUESTS": NUMBER,
        "EXECUTION_MODE_HINT": one_of("PERFORMANCE", "ACCURACY"),
        "COMPILATION_NUM_THREADS": NUMBER,
        "MODEL_PRIORITY": _PRIORITY,
        "GPU_QUEUE_PRIORITY": _PRIORITY,
        "GPU_QUEUE_THROTTLE": _PRIORITY,
        "GPU_HOST_TASK_PRIORITY": _PRIORITY,
        "GPU_ENABLE_LOOP_UNROLLING": YES_NO,
        "GPU_DISABLE_WINOGRAD_CONVOLUTION": YES_NO,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": NUMBER,
    },
    "NPU": {
        "PERFORMANCE_HINT_NUM_REQUESTS": NUMBER,
        "MODEL_PRIORITY": _PRIORITY,
        "NPU_TURBO": YES_NO,
        "NPU_TILES": NUMBER,
    },
}


def platform(target: str, options: EngineOptions) -> Platform:
    """This machine's platform. Raises MissingDependencyError; DeviceError: the device or its precision is missing."""
    openvino, device = _import(target), DEVICES[target]
    core = _core()
    if device not in {name.partition(".")[0] for name in core.available_devices}:
        raise DeviceError(f"OpenVINO finds no {device}, only {', '.join(core.available_devices) or 'nothing'}", _LACKS)
    capabilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if options.precision == "bf16" and "BF16" not in capabilities:
        raise DeviceError(f"this {device} supports {', '.join(capabilities)}, but not bf16", "omit --precision")
    supported = core.get_property(device, "SUPPORTED_PROPERTIES")
    drivers = [name for name in ("GPU_DRIVER_VERSION", "NPU_DRIVER_VERSION") if name in supported]
    driver = str(core.get_property(device, drivers[0])) if drivers else ""
    name = core.get_property(device, "FULL_DEVICE_NAME")
    features = cpu_features() if device == "CPU" else ()
    return Platform("openvino", openvino.__version__, name, driver, features)


def flags(target: str) -> Flags:
    """Properties of the plugin."""
    return _FLAGS[DEVICES[target]]


def precisions(target: str) -> tuple[Precision, ...]:
    """Those for which the plugin optimizes: not fp16 on a CPU that stores fp16 but computes in fp32."""
    platform(target, EngineOptions())  # raises if there is no such device
    halves: tuple[Precision, ...] = ("fp16", "bf16")
    capabilities = _core().get_property(DEVICES[target], "OPTIMIZATION_CAPABILITIES")
    return tuple(precision for precision in halves if precision.upper() in capabilities)


def compile(source: Source, directory: Path, progress: Progress) -> None:
    """Compile and export. With fp16, float weights take half the bytes. Raises BundleError, DeviceError."""
    progress("compiling", 0, None)
    compiled = _compiled(source, None)
    with _translated(f"{source.target} could not export the compiled model", DeviceError):
        blob = compiled.export_model()
    (directory / _BLOB).write_bytes(blob if isinstance(blob, bytes) else blob.getbuffer())


def open(source: Source, directory: Path | None, threads: int | None) -> OpenvinoEngine:
    """Open a compiled model. Raises BundleError (the graph is unusable), EngineError, DeviceError."""
    openvino, core = _import(source.target), _core()
    blob = None
    if directory is None:
        compiled = _compiled(source, threads)
    else:
        rebuild = f"rebuild it: perceiver-export build BUNDLE --target {source.target} --force"
        with _translated(f"the engine in {directory} cannot be opened", EngineError, rebuild):
            # Plugins keep reading weights from imported memory, so the file is mapped as long as the engine lives.
            blob = openvino.Tensor(np.memmap(directory / _BLOB, np.uint8, mode="c"), shared_memory=True)
            compiled = core.import_model(blob, DEVICES[source.target], _properties(source, threads))
    return OpenvinoEngine(openvino, compiled, source, threads, blob)


def _compiled(source: Source, threads: int | None) -> Any:
    openvino, core = _import(source.target), _core()
    if not source.graph.is_file():
        raise BundleError(f"{source.graph} does not exist", "give the path of an ONNX file")
    with _translated(f"{source.graph} cannot be loaded", BundleError, "copy or export the damaged file again"):
        model = core.read_model(str(source.graph))
    _transpose_shared_weights(openvino, model, every=source.options.precision == "bf16")
    if source.options.precision == "fp16":
        model = _with_half_weights(openvino, core, model)
    given, precision = source.options.flags, source.options.precision
    hint = _LACKS if precision == "fp32" else "give another --precision"
    hint = f"omit --flag {', --flag '.join(given)}" if given else hint
    with _translated(f"{source.target} cannot compile {source.graph.name} in {precision}", DeviceError, hint):
        if precision == "bf16":
            _compute_first_factors(openvino, model)
        return core.compile_model(model, DEVICES[source.target], _properties(source, threads))


def _with_half_weights(openvino: Any, core: Any, model: Any) -> Any:
    """The model with its linear layers' weights in fp16, decompressed where they are used."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.xml"
        hint = "free space there, or name another directory with TMPDIR"
        with _translated(f"the model's weights cannot be written to {directory}", BuildError, hint):
            openvino.save_model(model, path, compress_to_fp16=True)
            model = core.read_model(path).clone()
    for node in model.get_ops():
        # Only float constants: a quantized model's integers stay integers.
        held = node.input_value(0).get_node() if node.get_type_name() == "Convert" else node
        if held.get_type_name() != "Constant" or held is node or held.get_element_type() != openvino.Type.f16:
            continue
        uses = [(use.get_node().get_type_name(), use.get_index()) for use in node.output(0).get_target_inputs()]
        # Only weights: if a MatMul's first input is such a constant (a Perceiver's constant queries), its output
        # changes from call to call, because OpenVINO 2026.4 decompresses it into memory that it then reuses.
        if any(use != ("MatMul", 1) for use in uses):
            node.output(0).replace(openvino.op.Constant(held.data.astype(np.float32)).output(0))
    return model


def _transpose_shared_weights(openvino: Any, model: Any, every: bool) -> None:
    """Store float weights that several products share in the layout that the plugin reads: (outputs, inputs).

    OpenVINO 2026.4 gives wrong answers if a square weight is used both as it is and transposed, so such weights always
    change. With ``every`` (for bf16), all shared weights change: OpenVINO would transpose and convert the others once
    per use, which takes eight times the bf16 weights of a Perceiver whose blocks share theirs.
    """
    for held in model.get_ops():
        if held.get_type_name() != "Constant" or held.get_element_type() != openvino.Type.f32 or len(held.shape) != 2:
            continue
        uses = [(use.get_node(), use.get_index()) for use in held.output(0).get_target_inputs()]
        products = [node for node, index in uses if index == 1 and node.get_type_name() == "MatMul"]
        plain = [node for node in products if not node.get_attributes()["transpose_b"]]
        if not plain or len(uses) == 1 or (len(plain) == len(uses) and not every):
            continue
        transposed = openvino.op.Constant(np.ascontiguousarray(held.data.T))
        for node in plain:
            node.input(1).replace_source_output(transposed.output(0))
            node.set_attribute("transpose_b", True)
    model.validate_nodes_and_infer_types()


def _compute_first_factors(openvino: Any, model: Any) -> None:
    """Add a number of the second factor, clamped to 0, to every constant first factor, such as a Perceiver's queries.

    OpenVINO 2026.4 does not convert such a constant to bf16, and multiplies in fp32. Constants that are converted from
    another type stay: integer kernels need them.
    """
    ops, constant = openvino.opset13, set()
    for node in model.get_ordered_ops():
        sources = [node.input_value(index) for index in range(node.get_input_size())]
        known = [one.get_node().get_name() in constant for one in sources]
        kind = node.get_type_name()
        if kind == "Constant" or (known and all(known) and kind != "Convert"):
            constant.add(node.get_name())
        elif kind == "MatMul" and known == [True, False] and sources[1].get_element_type() == openvino.Type.f32:
            rank = sources[1].get_partial_shape().rank
            if rank.is_static:
                number = ops.slice(sources[1], *([value] * rank.get_length() for value in (0, 1, 1)))
                zero = ops.clamp(ops.reshape(number, [1], False), 0.0, 0.0)  # also of NaN and infinity
                node.input(0).replace_source_output(ops.add(sources[0], zero).output(0))


def _properties(source: Source, threads: int | None) -> dict[str, Any]:
    # A CPU without fp16 arithmetic still stores weights in half the memory, and computes in fp32.
    precision = source.options.precision
    device = DEVICES[source.target]
    halves = device != "CPU" or "fp16" in precisions(source.target)
    properties: dict[str, Any] = {"PERFORMANCE_HINT": source.options.hint.upper()}
    if device != "NPU":  # an NPU computes only in fp16 and int8
        properties["INFERENCE_PRECISION_HINT"] = _ARITHMETIC[precision if precision != "fp16" or halves else "fp32"]
    if device == "CPU":
        properties = {**CPU_ARITHMETIC, **properties}
    if threads is not None and device == "CPU":
        properties["INFERENCE_NUM_THREADS"] = threads
    return {**properties, **source.options.flags}


@functools.cache
def _core() -> Any:
    openvino = _import("openvino-cpu")
    # OpenVINO 2026.4 fills its tables of dtypes at first use, and two threads that do so at once wait forever.
    with FIRST_USE:
        openvino.Tensor(np.zeros(1, np.float32)).data  # noqa: B018
    return openvino.Core()


def _import(target: str) -> Any:
    with without_openvinos():
        return require("openvino", f"target {target}", "openvino")


@contextmanager
def _translated(
    what: str, kind: type[BuildError | BundleError | DeviceError | EngineError], hint: str = _LACKS
) -> Iterator[None]:
    """Turn OpenVINO's errors into ``kind``: it raises RuntimeError for everything, so each caller knows the cause."""
    try:
        yield
    except RuntimeError as error:
        raise kind(f"{what}: {first_line(error)}", hint) from error
