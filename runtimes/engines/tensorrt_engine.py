# SPDX-License-Identifier: Apache-2.0
"""Run a TensorRT engine on arrays: tensors by name, one stream per caller, runs recorded as CUDA graphs."""

from __future__ import annotations

import contextlib
import math
import queue
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.runtimes.engines.backend import Array, Feeds, Platform, Source
from perceiver_export.runtimes.engines.cuda import Buffer, Cuda, Stream
from perceiver_export.runtimes.engines.tensorrt_build import make_logger, start
from perceiver_export.runtimes.engines.tensorrt_versions import KernelCache
from perceiver_export.runtimes.errors import DeviceError, EngineError
from perceiver_export.runtimes.manifest import TensorSpec

# Concurrent callers. Each holds buffers and an execution context with its activations.
_SLOTS = 2


class TensorrtEngine:
    """One engine with `_SLOTS` slots; further callers wait for a free one. If memory is too small for a second slot,
    callers take turns in the first.

    Raises EngineError: the file is not an engine for this machine; DeviceError: no driver, or too little GPU memory.
    """

    def __init__(self, trt: Any, here: Platform, source: Source, path: Path, cuda: Cuda | None = None) -> None:
        self._here, self._source = here, source
        self.inputs, self.outputs = source.inputs, source.outputs
        self._cuda = cuda or Cuda()
        self._cuda.enter()
        self._logger = make_logger(trt)
        name = f"{here.library} {here.version}"
        self._runtime = start(trt.Runtime, self._logger, name)  # kept because the engine refers to it
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            said = " ".join(self._logger.problems[:1]) or "it gives no reason"
            raise EngineError(f"{name} cannot load {path}: {said}", f"build it here: {self._rebuild()}")
        self._check_names()
        # TensorRT for RTX compiles kernels for the GPU at their first run.
        self._kernels = KernelCache(self._engine, path) if here.library == "tensorrt-rtx" else None
        self._free: queue.LifoQueue[_Slot | None] = queue.LifoQueue()
        for slot in (*[None] * (_SLOTS - 1), self._new_slot()):  # None is a slot that is opened when it is needed
            self._free.put(slot)
        self._replays = False

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        with self._slot() as slot:
            outputs = slot.run(feeds)
            if out is None:
                return {name: array.copy() for name, array in outputs.items()}
            for name, array in outputs.items():
                np.copyto(out[name], array)
            return dict(out)

    def describe(self) -> dict[str, Any]:
        """Target, device and versions; ``zero_copy``: host and GPU share buffers; ``cuda_graph``: runs are replayed."""
        here = self._here
        return {
            **self._source.described(here.device, here.library, here.version, "none of the CPU's"),
            "precision": self._source.compiled_precision,
            "zero_copy": self._cuda.shares_memory,
            "cuda_graph": self._replays,
        }

    def _check_names(self) -> None:
        found = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        wanted = {spec.name for spec in (*self.inputs, *self.outputs)}
        if found != wanted:
            said = f"the engine has the tensors {', '.join(sorted(found))}, but the bundle {', '.join(sorted(wanted))}"
            raise EngineError(said, f"build it again: {self._rebuild()}")

    def _rebuild(self) -> str:
        bundle, precision = self._source.graph.parent, self._source.options.precision
        return f"perceiver-export build {bundle} --target {self._source.target} --precision {precision} --force"

    def _new_slot(self) -> _Slot:
        context = self._kernels.context() if self._kernels else self._engine.create_execution_context()
        if context is None:
            said = f"{self._here.device} has too little memory for this engine: {' '.join(self._logger.problems[-1:])}"
            raise DeviceError(said, "free GPU memory, or export with a smaller --memory-budget")
        return _Slot(self._cuda, context, self._source)

    @contextlib.contextmanager
    def _slot(self) -> Iterator[_Slot]:
        slot = self._take()
        try:
            yield slot
            if self._kernels and slot.runs == 1:
                self._kernels.keep()
        finally:
            self._replays |= slot.replays
            self._free.put(slot)

    def _take(self) -> _Slot:
        self._cuda.enter()  # this may be the calling thread's first CUDA call
        while (slot := self._free.get()) is None:
            with contextlib.suppress(DeviceError):  # no memory for another slot: wait for an open one
                return self._new_slot()
        return slot


class _Slot:
    """An execution context with its stream and buffers, for one caller at a time."""

    def __init__(self, cuda: Cuda, context: Any, source: Source) -> None:
        self._context, self._source = context, source
        self._stream = Stream(cuda)

        self._dynamic = any(isinstance(size, str) for spec in source.inputs for size in spec.shape)
        self.runs = 0
        self.replays = False
        self._buffers: dict[str, Buffer] = {}
        for spec in (*source.inputs, *source.outputs):
            sizes = (source.options.shapes[size][2] if isinstance(size, str) else size for size in spec.shape)
            self._buffers[spec.name] = Buffer(cuda, np.dtype(spec.dtype), math.prod(sizes))
            context.set_tensor_address(spec.name, self._buffers[spec.name].address)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Views of the slot's own buffers, valid until it runs again."""
        sizes: dict[str, int] = {}
        for spec in self._source.inputs:
            array = feeds[spec.name]
            self._buffers[spec.name].array[: array.size] = array.reshape(-1)
            sizes |= {name: size for name, size in zip(spec.shape, array.shape, strict=True) if isinstance(name, str)}
            if self._dynamic and not self._context.set_input_shape(spec.name, array.shape):
                raise DeviceError(f"the engine rejects {spec.name!r} of shape {list(array.shape)}", "build it again")
        if self.replays:
            self._stream.replay()
        else:
            self._enqueue(sizes)
        self._stream.wait()
        self.runs += 1
        if self.runs == 1 and not self._dynamic:  # TensorRT requires one ordinary run before recording
            self.replays = self._stream.record(lambda: self._enqueue({}))
        return {spec.name: self._view(spec, sizes) for spec in self._source.outputs}

    def _enqueue(self, sizes: Mapping[str, int]) -> None:
        for spec in self._source.inputs:
            self._buffers[spec.name].copy(True, math.prod(_shape(spec, sizes)), self._stream)
        if not self._context.execute_async_v3(self._stream.handle.value):
            raise DeviceError("TensorRT could not run the engine", "build it again, or run perceiver-export doctor")
        for spec in self._source.outputs:
            self._buffers[spec.name].copy(False, math.prod(_shape(spec, sizes)), self._stream)

    def _view(self, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
        shape = _shape(spec, sizes)
        return self._buffers[spec.name].array[: math.prod(shape)].reshape(shape)


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
