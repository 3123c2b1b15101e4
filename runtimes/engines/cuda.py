# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver through ctypes: GPUs, streams, graphs and memory. It needs only the driver, no Python package.

GPUs are listed before TensorRT is imported, because without a driver TensorRT's runtime ends the process. A GPU that
shares the CPU's memory (Jetson) maps page-locked host memory into its address space, so nothing is copied. Other GPUs
get a page-locked host buffer and a device buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from perceiver_export.runtimes.engines.backend import Array
from perceiver_export.runtimes.errors import DeviceError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """One GPU. ``name`` includes its compute capability: "NVIDIA Orin (sm_87)"; ``memory`` is in bytes."""

    name: str
    compute_capability: tuple[int, int]
    memory: int


@functools.cache
def cuda_gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process can use; empty if there is no driver or it does not start."""
    driver = load_driver()
    count = ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_gpu(driver, index) for index in range(count.value))


def driver_version() -> str:
    """The newest CUDA version that the driver supports, such as "13.0"; empty without a driver."""
    driver, version = load_driver(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    capability = (major.value, minor.value)
    label = f"{name.value.decode(errors='replace')} (sm_{capability[0]}{capability[1]})"
    return Gpu(label, capability, memory.value)


@functools.cache
def load_driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


_INTEGRATED = 18  # CU_DEVICE_ATTRIBUTE_INTEGRATED
_PORTABLE_AND_MAPPED = 1 | 2  # CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_CAPTURE_THREAD_LOCAL = 1
_OUT_OF_MEMORY = 2


class Cuda:
    """The first GPU's primary context, which TensorRT also uses; `cuda_gpus` found it. Raises DeviceError."""

    def __init__(self, driver: Any = None) -> None:
        self.driver: Any = driver or load_driver()
        device, context, integrated = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuDeviceGetAttribute", ctypes.byref(integrated), _INTEGRATED, device)
        self.context = context
        self.shares_memory = bool(integrated.value)

    def call(self, function: str, *arguments: Any) -> None:
        """Call a driver function. Raises DeviceError with the driver's message."""
        code = getattr(self.driver, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(text))
            said = text.value.decode(errors="replace") if text.value else "no reason given"
            hint = "free GPU memory, or load fewer models" if code == _OUT_OF_MEMORY else "run perceiver-export doctor"
            raise DeviceError(f"CUDA error {code} in {function}: {said}", hint)

    def enter(self) -> None:
        """Make this context current in the calling thread. Every thread that calls an engine must do so."""
        self.call("cuCtxSetCurrent", self.context)


class Stream:
    """A CUDA stream: its own work runs in order, concurrently with other streams."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._graph: ctypes.c_void_p | None = None
        self.handle = ctypes.c_void_p()
        cuda.call("cuStreamCreate", ctypes.byref(self.handle), _NON_BLOCKING)

    def wait(self) -> None:
        """Wait until all queued work is done. Raises DeviceError if any of it failed."""
        self._cuda.call("cuStreamSynchronize", self.handle)

    def record(self, work: Callable[[], None]) -> bool:
        """Record ``work`` as a graph for `replay` instead of running it; False if it cannot be recorded."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        if self._cuda.driver.cuStreamBeginCapture_v2(self.handle, _CAPTURE_THREAD_LOCAL):
            return False
        whole = True
        try:
            work()
        except DeviceError:
            whole = False
        if self._cuda.driver.cuStreamEndCapture(self.handle, ctypes.byref(graph)) or not graph:
            return False
        if whole and not self._cuda.driver.cuGraphInstantiateWithFlags(
            ctypes.byref(executable), graph, ctypes.c_ulonglong(0)
        ):
            self._graph = executable
        self._cuda.driver.cuGraphDestroy(graph)  # the executable does not need it
        return self._graph is not None

    def replay(self) -> None:
        """Run the recorded graph."""
        self._cuda.call("cuGraphLaunch", self._graph, self.handle)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, DeviceError):  # never opened, or the interpreter is shutting down
            self._cuda.enter()
            if self._graph is not None:
                self._cuda.driver.cuGraphExecDestroy(self._graph)
            self._cuda.driver.cuStreamDestroy_v2(self.handle)


class Buffer:
    """Memory for one tensor: ``array`` is the flat host array of ``size`` elements, ``address`` is the GPU's."""

    def __init__(self, cuda: Cuda, dtype: np.dtype[Any], size: int) -> None:
        self._cuda = cuda
        self._device = ctypes.c_void_p()
        self._host = ctypes.c_void_p()
        nbytes = max(dtype.itemsize * size, 1)
        cuda.call("cuMemHostAlloc", ctypes.byref(self._host), ctypes.c_size_t(nbytes), _PORTABLE_AND_MAPPED)
        memory = (ctypes.c_char * nbytes).from_address(self._host.value or 0)
        self.array: Array = np.frombuffer(memoryview(memory), dtype, size)
        address = ctypes.c_void_p()
        if cuda.shares_memory:
            cuda.call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), self._host, 0)
        else:
            cuda.call("cuMemAlloc_v2", ctypes.byref(self._device), ctypes.c_size_t(nbytes))
            address = self._device
        self.address = int(address.value or 0)

    def copy(self, to_device: bool, size: int, stream: Stream) -> None:
        """Start copying the first ``size`` elements to or from the device; shared memory needs no copy."""
        if not self._cuda.shares_memory:
            name, ends = "cuMemcpyDtoHAsync_v2", (self._host, self._device)
            if to_device:
                name, ends = "cuMemcpyHtoDAsync_v2", (self._device, self._host)
            self._cuda.call(name, *ends, ctypes.c_size_t(self.array.itemsize * size), stream.handle)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, DeviceError):
            self._cuda.enter()
            if self._device.value:
                self._cuda.driver.cuMemFree_v2(self._device)
            if self._host.value:
                self._cuda.driver.cuMemFreeHost(self._host)
