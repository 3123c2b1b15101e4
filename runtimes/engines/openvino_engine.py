# SPDX-License-Identifier: Apache-2.0
"""Run a model that OpenVINO compiled, and read from it the types in which it computes.

An infer request runs one inference at a time, so each call takes a free request or creates one. Inputs and outputs of
fixed shape are bound to the caller's memory; arrays so small that binding costs more than a copy are copied.

Neither a setting nor a weight's type shows in which type the CPU computes. The name of the kernel does: it ends in the
type of its products, as in ``brgemm_avx512_amx_bf16``.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from perceiver_export.runtimes.engines.backend import Array, Feeds, Kernel, Source
from perceiver_export.runtimes.errors import DeviceError
from perceiver_export.runtimes.manifest import DType, TensorSpec

DEVICES = {"openvino-cpu": "CPU", "openvino-gpu": "GPU", "openvino-npu": "NPU"}
_DEQUANTIZATION = "/DequantizationMultiply"  # OpenVINO's suffix for a product whose scales it moved after the product
_WEIGHT = "/transpose_b"  # OpenVINO appends this to a product's name to name its weight
_PRODUCTS = frozenset({"FullyConnected", "MatMul", "Convolution"})
_NAMES = {"f32": "fp32", "f16": "fp16", "u8": "int8", "i8": "int8"}
_UNQUANTIZED = ("f32", "bf16", "f16")
_ORDER = ("int8", "bf16", "fp16", "fp32")
_DTYPES: dict[str, DType] = {"f32": "float32", "i32": "int32", "i64": "int64", "u8": "uint8", "boolean": "bool"}
_SMALL = 16 << 10  # bytes: a copy takes about a microsecond, binding takes several


def kernels(compiled: Any) -> Iterator[tuple[str, Kernel]]:
    """All kernels of a compiled model, each with OpenVINO's name for it.

    A kernel named after its scales also has the product's name, from the weight's. Bytes exclude arrays of dynamic
    shape.
    """
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        layer, primitive, nodes = (_text(info, name) for name in ("layerType", "primitiveType", "originalLayersNames"))
        reads = [one.get_source_output() for one in op.inputs()]
        sources = (one.get_node().get_friendly_name() for one in reads)
        products = (name.removesuffix(_WEIGHT) for name in sources if name.endswith(_WEIGHT))
        moved = sum(map(_port_bytes, (*reads, *op.outputs())))
        name = op.get_friendly_name()
        names = tuple(one.removesuffix(_DEQUANTIZATION) for one in (*nodes.split(","), *products, name) if one)
        precision = named(primitive.rpartition("_")[2].lower())
        if precision == "int8" and layer not in _PRODUCTS:  # u8 holds booleans too
            types = {one.get_element_type().get_type_name() for one in reads or op.outputs()}
            precision = next((named(one) for one in _UNQUANTIZED if one in types), "int8" if "i8" in types else "u8")
        yield name, Kernel(names, f"{layer} {primitive}", precision, layer in _PRODUCTS, moved)


def _port_bytes(port: Any) -> int:
    shape = port.get_partial_shape()
    elements = math.prod(dim.get_length() for dim in shape) if shape.is_static else 0
    return int(elements * port.get_element_type().bitwidth // 8)


def arithmetic(compiled: Any, device: str) -> str:
    """The types in which products and everything else compute, narrowest first: ``int8, bf16 and fp32``.

    On a GPU or an NPU this is only the precision hint, because their kernels' names do not show a type.
    """
    found = {named(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())}
    if device == "CPU":
        found |= {kernel.precision for _, kernel in kernels(compiled) if kernel.product}
    *first, last = sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else -1)
    return f"{', '.join(first)} and {last}" if first else last


def named(element: str) -> str:
    """This project's name for an OpenVINO type: fp32 for f32, int8 for i8 and u8."""
    return _NAMES.get(element, element)


def first_line(error: RuntimeError) -> str:
    """The informative part of OpenVINO's message."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith("Exception from")]
    return lines[0] if lines else str(error)


def _text(info: Any, name: str) -> str:
    value = info[name] if name in info else ""  # noqa: SIM401  it has no `get`
    return str(getattr(value, "value", value))


class OpenvinoEngine:
    """One compiled model and its requests."""

    def __init__(self, openvino: Any, compiled: Any, source: Source, threads: int | None, blob: Any = None) -> None:
        self._tensor: Callable[..., Any] = openvino.Tensor
        self._compiled = compiled
        self._blob = blob  # kept because the weights may be in this memory
        self._source = source
        self._threads = threads
        self._version = openvino.__version__
        names = {spec.name for spec in (*source.inputs, *source.outputs)}
        self.inputs = tuple(_spec(port, names) for port in compiled.inputs)
        self.outputs = tuple(_spec(port, names) for port in compiled.outputs)
        # As many as the device recommends, but at least two, so that one is ready when another ends.
        self.in_flight = max(2, int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")))
        self._free: deque[_Request] = deque()

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        request = None
        try:
            with suppress(IndexError):  # no request is free
                request = self._free.popleft()
            if request is None:
                request = _Request(self._compiled, self._tensor, self.inputs, self.outputs)
            return request.run(feeds, out)
        except RuntimeError as error:
            raise DeviceError(f"inference failed: {first_line(error)}", "run `perceiver-export doctor`") from error
        finally:
            if request is not None:
                self._free.append(request)

    def describe(self) -> dict[str, Any]:
        device = ", ".join(self._compiled.get_property("EXECUTION_DEVICES"))
        described = {
            **self._source.described(device, "openvino", self._version, self._threads or "all cores"),
            "hint": str(self._compiled.get_property("PERFORMANCE_HINT")).lower(),
            "streams": int(self._compiled.get_property("NUM_STREAMS")),
            "arithmetic": self._arithmetic,
        }
        if self._source.engine_precision != "fp32":
            described["precision"] = self._source.compiled_precision
        return described

    def kernels(self) -> tuple[tuple[str, Kernel], ...]:
        """All kernels, each with OpenVINO's name for it."""
        return tuple(kernels(self._compiled))

    def kernel_times(self) -> dict[str, float]:
        """Milliseconds of each kernel in the last call, by its name. The engine was opened with PERF_COUNT."""
        measured = self._free[-1].profiling()
        return {one.node_name: one.real_time.total_seconds() * 1e3 for one in measured if one.real_time}

    @functools.cached_property
    def _arithmetic(self) -> str:
        return arithmetic(self._compiled, DEVICES[self._source.target])


class _Request:
    """An infer request and the memory to which it is bound."""

    def __init__(
        self, compiled: Any, tensor: Callable[..., Any], inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self._request = request = compiled.create_infer_request()
        self._tensor, self._inputs, self._outputs = tensor, inputs, outputs
        # With one thread, `infer` does not raise when an inference fails, but `wait` does.
        name = "INFERENCE_NUM_THREADS"
        self._waits = name in compiled.get_property("SUPPORTED_PROPERTIES") and compiled.get_property(name) == 1
        sizes = {spec.name: _num_bytes(spec) for spec in (*inputs, *outputs)}
        # The request's own memory, for small arrays. Outputs of variable shape are looked up after each run.
        self._in, self._out = (
            {spec.name: get(index).data for index, spec in enumerate(specs) if 0 <= sizes[spec.name] <= _SMALL}
            for get, specs in ((request.get_input_tensor, inputs), (request.get_output_tensor, outputs))
        )
        self._bound = {spec.name for spec in outputs if sizes[spec.name] > _SMALL}

    def profiling(self) -> Any:
        """OpenVINO's own record of the last call."""
        return self._request.profiling_info

    def _infer(self) -> None:
        if not self._waits:
            self._request.infer(share_outputs=True)  # by default it copies all outputs
            return
        try:
            self._request.start_async()
        finally:  # also after Ctrl-C: it reads and writes the caller's arrays
            self._request.wait()

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> dict[str, Array]:
        """Outputs in ``out``, or in new arrays that the caller owns. Raises RuntimeError."""
        for index, spec in enumerate(self._inputs):
            array = feeds[spec.name]
            if spec.name in self._in:
                np.copyto(self._in[spec.name], array)
            else:  # OpenVINO shares only writable memory
                self._request.set_input_tensor(index, self._tensor(array, shared_memory=array.flags.writeable))
        found: dict[str, Array] = {} if out is None else dict(out)
        for index, spec in enumerate(self._outputs):
            if spec.name in self._bound:
                if out is None:
                    found[spec.name] = np.empty([int(dim) for dim in spec.shape], spec.dtype)
                self._request.set_output_tensor(index, self._tensor(found[spec.name], shared_memory=True))
        self._infer()
        for index, spec in enumerate(self._outputs):
            if spec.name not in self._bound:
                own = self._out.get(spec.name)
                held = self._request.get_output_tensor(index).data if own is None else own
                if out is None:
                    found[spec.name] = held.copy()
                else:
                    np.copyto(out[spec.name], held)
        return found


def _num_bytes(spec: TensorSpec) -> int:
    """The tensor's size in bytes; -1 if its shape is not fixed."""
    sizes = [dim for dim in spec.shape if isinstance(dim, int)]
    return math.prod(sizes) * np.dtype(spec.dtype).itemsize if len(sizes) == len(spec.shape) else -1


def _spec(port: Any, known: set[str]) -> TensorSpec:
    """A port's name, dtype and shape. OpenVINO keeps every name that a tensor ever had, including the bundle's."""
    name = next((name for name in port.get_names() if name in known), port.get_any_name())
    element = port.get_element_type().get_type_name()
    if element not in _DTYPES:
        raise DeviceError(f"{name!r} is {element}, which is not supported", "export with float32 or int32")
    shape = tuple(
        dim.get_length() if dim.is_static else f"dim{axis}" for axis, dim in enumerate(port.get_partial_shape())
    )
    return TensorSpec(name=name, dtype=_DTYPES[element], shape=shape)
