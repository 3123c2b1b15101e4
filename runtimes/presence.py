# SPDX-License-Identifier: Apache-2.0
"""Which targets can run here, and which of them ``device="auto"`` takes."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.engines.backend import EngineOptions
from perceiver_export.runtimes.engines.cuda_driver import cuda_gpus
from perceiver_export.runtimes.engines.records import make_source
from perceiver_export.runtimes.engines.targets import TARGETS, Target
from perceiver_export.runtimes.errors import BundleError, DeviceError, MissingDependencyError, PerceiverExportError
from perceiver_export.runtimes.hardware import device_files
from perceiver_export.runtimes.report import median_latency

_CPU_TARGETS = ("openvino-cpu", "ort-cpu")


@dataclass(frozen=True)
class Device:
    """A target that this machine can run."""

    target: str
    name: str
    engine: str


@dataclass(frozen=True)
class Presence:
    """A target, and the device that it would run on here; or why it cannot, and what to do about that."""

    target: Target
    device: Device | None
    problem: str = ""
    fix: str = ""


def presence(target: Target) -> Presence:
    """Ask the target's library, which is imported for it."""
    try:
        platform = target.backend().platform(target.name, EngineOptions())
    except (DeviceError, MissingDependencyError) as error:
        return Presence(target, None, error.message, error.hint)
    return Presence(target, Device(target.name, platform.device, f"{platform.library} {platform.version}"))


def devices() -> tuple[Device, ...]:
    """Targets that are present, in the order in which ``device="auto"`` looks at them."""
    found = (presence(target).device for target in TARGETS.values() if target.version())
    return tuple(device for device in found if device is not None)


def choose_target(bundle: Bundle) -> str:
    """What ``device="auto"`` is: the first target of the table that is present and, where compiling takes minutes, has
    an engine for here; of the two that run on the CPU the one that the bundle's report says is faster on this CPU, else
    ort-cpu, else openvino-cpu.

    Raises MissingDependencyError: none is present.
    """
    for name, target in TARGETS.items():
        if name in _CPU_TARGETS or not target.version() or not _hardware_here(target):
            continue
        if presence(target).device and _can_load(bundle, target):
            return name
    present = [name for name in ("ort-cpu", "openvino-cpu") if TARGETS[name].version()]
    present = [name for name in present if _can_load(bundle, TARGETS[name])] or present
    if not present:
        raise MissingDependencyError("no engine is installed that could run here", TARGETS["ort-cpu"].install)
    measured = {name: median_latency(bundle.path, name) for name in present}
    return min(present, key=lambda name: (measured[name] is None, measured[name] or 0.0))


def _hardware_here(target: Target) -> bool:
    """Whether to ask the target's library at all: importing one for nothing costs every app that starts."""
    if target.hardware == "NVIDIA GPU":
        return bool(cuda_gpus())
    if sys.platform != "linux":
        return True
    return bool(device_files("dri/renderD*" if target.hardware == "Intel GPU" else "accel/accel*"))


def _can_load(bundle: Bundle, target: Target) -> bool:
    from perceiver_export.runtimes.loading import find_engine

    try:
        for name, part in bundle.manifest.parts.items():
            source = make_source(bundle, part, target.name, EngineOptions())
            if target.needs_engine and find_engine(bundle, name, source, target.backend(), None)[0] is None:
                return False
    except BundleError:  # quantized, without a graph for this target
        return False
    except PerceiverExportError:
        return False
    return True
