# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs as their driver tells of them (CUDA driver API through ctypes): asked before any library that needs one.

TensorRT's runtime, for one, takes the whole process down where there is no driver.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """One GPU. ``name`` has its compute capability: "NVIDIA Orin (sm_87)"; ``memory`` is in bytes."""

    name: str
    compute_capability: tuple[int, int]
    memory: int


@functools.cache
def cuda_gpus() -> tuple[Gpu, ...]:
    """GPUs that the driver gives this process; none without a driver or where it does not start."""
    driver = load_driver()
    count = ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_gpu(driver, index) for index in range(count.value))


def driver_version() -> str:
    """The newest CUDA that the driver runs, "13.0"; empty without a driver."""
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
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
