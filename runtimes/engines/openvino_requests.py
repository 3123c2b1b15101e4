# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's infer requests behind `run` and `submit`.

A request runs one inference at a time, so each call takes a free one, or makes one. Inputs and outputs of fixed shape
are the caller's own memory; nothing is copied, but for arrays so small that a copy costs less than an address.
"""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from perceiver_export.runtimes.engines.backend import Array, Feeds, Source
from perceiver_export.runtimes.errors import DeviceError
from perceiver_export.runtimes.manifest import DType, TensorSpec

_DTYPES: dict[str, DType] = {"f32": "float32", "i32": "int32", "i64": "int64", "u8": "uint8", "boolean": "bool"}
_SMALL = 16 << 10  # bytes; copied in about a microsecond, where binding takes several
_Submitted = tuple[Feeds, "Future[dict[str, Array]]"]


class OpenvinoEngine:
    """One compiled model and its requests."""

    def __init__(self, openvino: Any, compiled: Any, source: Source, threads: int | None, blob: Any = None) -> None:
        self._tensor: Callable[..., Any] = openvino.Tensor
        self._compiled = compiled
        self._blob = blob  # the memory that weights may lie in
        self._source = source
        self._threads = threads
        self._version = openvino.__version__
        names = {spec.name for spec in (*source.inputs, *source.outputs)}
        self.inputs = tuple(_spec(port, names) for port in compiled.inputs)
        self.outputs = tuple(_spec(port, names) for port in compiled.outputs)
        self._free: deque[_Request] = deque()
        # As many at once as the device wants, and two, so that one is always ready when another ends.
        self._most = max(2, int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")))
        self._lock = threading.Lock()
        self._running = 0
        self._waiting: deque[_Submitted] = deque()
        self._started: queue.SimpleQueue[_Started | None] | None = None
        self._waiter: threading.Thread | None = None
        self._waiter_id: int | None = None

    def run(self, feeds: Feeds) -> dict[str, Array]:
        request = self._take()
        try:
            request.bind(feeds)
            request.infer()
            return request.results()
        finally:
            self._free.append(request)

    def run_into(self, feeds: Feeds, out: Mapping[str, Array]) -> None:
        request = self._take()
        try:
            request.bind(feeds, out)
            request.infer()
            request.results_into(out)
        finally:
            self._free.append(request)

    def submit(self, feeds: Feeds) -> Future[dict[str, Array]]:
        future: Future[dict[str, Array]] = Future()
        with self._lock:
            if self._waiter is None:
                self._started = queue.SimpleQueue()
                self._waiter = threading.Thread(
                    target=_finish_in_order, args=(self._started,), name="perceiver-export", daemon=True
                )
                self._waiter.start()
                self._waiter_id = self._waiter.ident
            if self._running >= self._most:
                self._waiting.append((feeds, future))
                return future
            self._running += 1
        future.set_running_or_notify_cancel()
        if not self._start(None, feeds, future):
            self._next(None)
        return future

    def in_callback(self) -> bool:
        return threading.get_ident() == self._waiter_id

    def close(self) -> None:
        with self._lock:
            waiter, started, self._waiter = self._waiter, self._started, None
        if waiter is None or started is None:
            return
        started.put(None)
        if self.in_callback():  # a callback does not wait for itself; the interpreter's exit does
            threading.Thread(target=waiter.join, name="perceiver-export-close", daemon=False).start()
        else:
            waiter.join()

    def describe(self) -> dict[str, Any]:
        properties = {name: self._compiled.get_property(name) for name in ("PERFORMANCE_HINT", "NUM_STREAMS")}
        described = {
            "target": self._source.target,
            "device": ", ".join(self._compiled.get_property("EXECUTION_DEVICES")),
            "engine": "openvino",
            "version": self._version,
            "threads": self._threads or "all cores",
            "hint": str(properties["PERFORMANCE_HINT"]).lower(),
            "streams": int(properties["NUM_STREAMS"]),
            "arithmetic": self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
        }
        if self._source.options.precision != "fp32":
            described["precision"] = self._source.compiled_precision
        return described

    def _take(self) -> _Request:
        try:
            return self._free.popleft()
        except IndexError:
            pass
        try:
            request = self._compiled.create_infer_request()
        except RuntimeError as error:
            raise _failed(error) from error
        return _Request(request, self._tensor, self.inputs, self.outputs)

    def _start(self, request: _Request | None, feeds: Feeds, future: Future[dict[str, Array]]) -> bool:
        """Start on a request, None: on a free one. Where it fails the future says so."""
        try:
            request = request or self._take()
            request.bind(feeds)
            request.start()
        except Exception as error:
            future.set_exception(error)
            return False
        assert self._started is not None
        self._started.put(_Started(self, request, feeds, future))
        return True

    def _next(self, request: _Request | None) -> None:
        """Give a request (None: it could not be started) to whoever waits, or put it back."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    if request is not None:
                        self._free.append(request)
                    return
                feeds, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel() and self._start(request, feeds, future):
                return


@dataclass(frozen=True)
class _Started:
    """A request on its way. The feeds are held because OpenVINO only knows their address."""

    engine: OpenvinoEngine
    request: _Request
    feeds: Feeds
    future: Future[dict[str, Array]]

    def finish(self) -> None:
        try:
            self.request.wait()
            result = self.request.results()
        except Exception as error:
            self.engine._next(self.request)
            self.future.set_exception(error)
        else:
            self.engine._next(self.request)  # before the caller's callbacks, so that the device does not wait for them
            self.future.set_result(result)


def _finish_in_order(started: queue.SimpleQueue[_Started | None]) -> None:
    """Wait for requests one after the other. OpenVINO's own callbacks are not called where an inference fails."""
    stopping = False
    while True:
        try:
            one = started.get(block=not stopping)
        except queue.Empty:
            return
        if one is None:
            stopping = True  # what was started or waits is finished first: finishing one starts the next
        else:
            one.finish()
        del one  # the engine lives on in the queue's items only


class _Request:
    """An infer request and the memory that it is bound to."""

    def __init__(
        self, request: Any, tensor: Callable[..., Any], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        self._request = request
        self._tensor = tensor
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        # The request's own memory, of small arrays.
        self._in = {
            spec.name: request.get_input_tensor(index).data for index, spec in enumerate(inputs) if _is_small(spec)
        }
        self._out = {
            spec.name: request.get_output_tensor(index).data for index, spec in enumerate(outputs) if _is_small(spec)
        }
        self._large = [
            (index, spec, [int(dim) for dim in spec.shape])
            for index, spec in enumerate(outputs)
            if spec.name not in self._out and _num_bytes(spec) is not None
        ]
        self._bound: dict[str, Array] = {}

    def bind(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> None:
        """Outputs go to ``out``, or to new arrays; those of no fixed shape are OpenVINO's until they are copied."""
        try:
            for index, spec in enumerate(self._inputs):
                array = feeds[spec.name]
                if spec.name in self._in:
                    np.copyto(self._in[spec.name], array)
                    continue
                shared = array.flags.writeable  # OpenVINO shares only what it might write to
                self._request.set_input_tensor(index, self._tensor(array, shared_memory=shared))
            for index, spec, shape in self._large:
                array = np.empty(shape, spec.dtype) if out is None else out[spec.name]
                self._request.set_output_tensor(index, self._tensor(array, shared_memory=True))
                self._bound[spec.name] = array
        except RuntimeError as error:
            raise _failed(error) from error

    def infer(self) -> None:
        try:
            self._request.infer(share_outputs=True)  # else it copies them all into a dictionary
        except RuntimeError as error:
            raise _failed(error) from error

    def start(self) -> None:
        try:
            self._request.start_async()
        except RuntimeError as error:
            raise _failed(error) from error

    def wait(self) -> None:
        try:
            self._request.wait()
        except RuntimeError as error:
            raise _failed(error) from error

    def results(self) -> dict[str, Array]:
        """Arrays that are the caller's alone."""
        found = {}
        for index, spec in enumerate(self._outputs):
            bound = self._bound.pop(spec.name, None)
            found[spec.name] = self._held(index, spec).copy() if bound is None else bound
        return found

    def results_into(self, out: Mapping[str, Array]) -> None:
        """Copy what is not there yet."""
        for index, spec in enumerate(self._outputs):
            if self._bound.pop(spec.name, None) is None:
                np.copyto(out[spec.name], self._held(index, spec))

    def _held(self, index: int, spec: TensorSpec) -> Array:
        own = self._out.get(spec.name)
        held: Array = self._request.get_output_tensor(index).data if own is None else own
        return held


def _is_small(spec: TensorSpec) -> bool:
    size = _num_bytes(spec)
    return size is not None and size <= _SMALL


def _num_bytes(spec: TensorSpec) -> int | None:
    """None where the shape is not fixed."""
    sizes = [dim for dim in spec.shape if isinstance(dim, int)]
    return math.prod(sizes) * np.dtype(spec.dtype).itemsize if len(sizes) == len(spec.shape) else None


def _failed(error: RuntimeError) -> DeviceError:
    lines = [line for line in str(error).splitlines() if line and not line.startswith("Exception from")]
    return DeviceError(f"inference failed: {lines[0] if lines else error}", "see `perceiver-export doctor`")


def _spec(port: Any, known: set[str]) -> TensorSpec:
    """OpenVINO gives a tensor all the names that it ever had; the bundle's is among them."""
    names = port.get_names()
    name = next((name for name in names if name in known), port.get_any_name())
    element = port.get_element_type().get_type_name()
    if element not in _DTYPES:
        raise DeviceError(f"{name!r} is a {element}, which this runtime does not carry", "export with float32 or int32")
    shape = tuple(
        dim.get_length() if dim.is_static else f"dim{axis}" for axis, dim in enumerate(port.get_partial_shape())
    )
    return TensorSpec(name=name, dtype=_DTYPES[element], shape=shape)
