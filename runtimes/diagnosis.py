# SPDX-License-Identifier: Apache-2.0
"""What is here to run on, and for each thing that is missing the command that brings it on this system."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from perceiver_export.runtimes.engines.cuda_driver import cuda_gpus, driver_version
from perceiver_export.runtimes.engines.targets import TARGETS, Target
from perceiver_export.runtimes.machine import (
    available_cores,
    board,
    cpu_features,
    cpu_name,
    device_files,
    jetson_linux,
    linux_distribution,
    pci_devices,
)
from perceiver_export.runtimes.presence import Device, presence_apart

_NVIDIA, _INTEL = "0x10de", "0x8086"
_DISPLAY, _ACCELERATOR = "0x03", "0x12"
_JETPACK = {"35": "JetPack 5", "36": "JetPack 6", "38": "JetPack 7", "39": "JetPack 7.2"}

# What each part of the work needs; any of the distributions will do, the first is what we would install.
_NEEDS = (
    ("read picture files", ("pillow",)),
    ("validate", ("scipy",)),
    ("export", ("torch",)),
    ("export", ("onnx",)),
    ("export", ("onnx-ir",)),
    ("export", ("onnxscript",)),
    ("export", ("safetensors",)),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` is the command to type, empty where nothing is missing or nothing would help.

    ``device`` is there where the line is of a target that runs here.
    """

    what: str
    needed_for: str
    found: str
    fix: str = ""
    device: Device | None = None


def doctor() -> tuple[Finding, ...]:
    """Everything that a run, validation or export on this machine depends on."""
    findings = [
        Finding("Python", "everything", platform.python_version()),
        Finding("system", "everything", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Finding("CPU", "targets on the CPU", f"{cpu_name()}, {available_cores()} cores available"),
        Finding("CPU features", "targets on the CPU", " ".join(cpu_features()) or "none of note found"),
        *_jetson(),
        _nvidia(),
        _intel_gpu(),
        _intel_npu(),
        *map(_target, TARGETS.values()),
    ]
    for needed_for, distributions in _NEEDS:
        version = _version(distributions)
        fix = "" if version else f"{sys.executable} -m pip install {distributions[0]}"
        findings.append(Finding(distributions[0], needed_for, version or "not installed", fix))
    return tuple(findings)


def _jetson() -> tuple[Finding, ...]:
    release = jetson_linux()
    if not release:
        return ()
    jetpack = _JETPACK.get(release.partition(".")[0], "an unknown JetPack")
    return (Finding("Jetson", "tensorrt", f"{board() or 'a board without a name'}, {jetpack} (L4T {release})"),)


def _nvidia() -> Finding:
    what, needed_for = "NVIDIA GPU", "tensorrt, tensorrt-rtx, ort-cuda"
    gpus = cuda_gpus()
    if gpus:
        listed = ", ".join(f"{gpu.name} {gpu.memory / 2**30:.0f} GiB" for gpu in gpus)
        return Finding(what, needed_for, f"{listed}; driver for CUDA {driver_version()}")
    if jetson_linux():
        return Finding(what, needed_for, "the driver does not start", "sudo apt install --reinstall nvidia-jetpack")
    if not pci_devices(_NVIDIA, (_DISPLAY,)):
        return Finding(what, needed_for, "none")
    return Finding(what, needed_for, "there is one, without a working driver", _install("nvidia-driver"))


def _intel_gpu() -> Finding:
    what, needed_for, files = "Intel GPU", "openvino-gpu", device_files("dri/renderD*")
    if not pci_devices(_INTEL, (_DISPLAY,)):
        return Finding(what, needed_for, "none")
    return _device_file(what, needed_for, files, "intel-opencl-icd", "render")


def _intel_npu() -> Finding:
    what, needed_for, files = "Intel NPU", "openvino-npu", device_files("accel/accel*")
    if not pci_devices(_INTEL, (_ACCELERATOR,)):
        return Finding(what, needed_for, "none")
    return _device_file(what, needed_for, files, "intel-level-zero-npu", "render")


def _device_file(what: str, needed_for: str, files: tuple[str, ...], package: str, group: str) -> Finding:
    if not files:
        return Finding(what, needed_for, "there is one, without a kernel driver", _install(package))
    if not any(os.access(file, os.R_OK | os.W_OK) for file in files):
        fix = f"sudo usermod -aG {group} $USER, and log in again"
        return Finding(what, needed_for, f"{', '.join(files)} may not be opened by you", fix)
    return Finding(what, needed_for, ", ".join(files))


def _target(target: Target) -> Finding:
    """Whether it runs; where it does not, a fix only if this machine has the hardware."""
    what, needed_for = f"target {target.name}", f"run on the {target.hardware}"
    hardware = {"NVIDIA GPU": _nvidia, "Intel GPU": _intel_gpu, "Intel NPU": _intel_npu}.get(target.hardware)
    found = hardware() if hardware is not None else None
    if found is not None and found.found == "none":
        compiles = "; it compiles here for others' (--flag compute_capability=sm86)"
        crossed = target.name == "tensorrt-rtx" and target.version()
        return Finding(what, needed_for, f"no {target.hardware} here{compiles if crossed else ''}")
    if found is not None and found.fix:
        return Finding(what, needed_for, f"{target.hardware}: {found.found}", found.fix)
    if not target.version():
        return Finding(what, needed_for, "not installed", _library(target))
    present = presence_apart(target)
    if present.device is not None:
        library, _, version = present.device.engine.partition(" ")
        found_as = f"{library} {version.partition('-')[0]} on {present.device.name}"  # OpenVINO's names its commit
        return Finding(what, needed_for, found_as, device=present.device)
    if target.module == "tensorrt":
        return Finding(what, needed_for, present.problem, present.fix)
    fix = _library(target) if target.hardware == "CPU" else _userspace(target)
    return Finding(what, needed_for, present.problem, fix)


def _library(target: Target) -> str:
    """The command that installs a target's library into this Python."""
    if target.name == "ort-cuda" and jetson_linux():
        return "use the target tensorrt: the index has no onnxruntime for a Jetson's GPU"
    if target.name == "tensorrt" and jetson_linux():
        return "sudo apt install nvidia-jetpack, and an environment made with python3 -m venv --system-site-packages"
    replaced = " && ".join(
        f"{sys.executable} -m pip {verb}" for verb in ("uninstall -y onnxruntime", "install onnxruntime-gpu")
    )
    return (
        replaced
        if target.name == "ort-cuda"
        else f"{sys.executable} -m pip install {target.distributions[0]}{target.from_index}"
    )


def _userspace(target: Target) -> str:
    """The command that installs what the library itself needs of the system."""
    packages = {"openvino-gpu": "intel-opencl-icd", "openvino-npu": "intel-level-zero-npu"}
    return _install(packages[target.name]) if target.name in packages else _library(target)


def _install(package: str) -> str:
    """The system's command for a package, in the distributions' own names."""
    family = linux_distribution().split()
    fedora = {"nvidia-driver": "akmod-nvidia", "intel-opencl-icd": "intel-compute-runtime"}
    if package == "intel-level-zero-npu":
        return "install the packages of https://github.com/intel/linux-npu-driver/releases"
    if "ubuntu" in family and package == "nvidia-driver":
        return "sudo ubuntu-drivers install"
    if "debian" in family:
        return f"sudo apt install {package}"
    if "fedora" in family or "rhel" in family:
        return f"sudo dnf install {fedora[package]}"
    return f"install {package} with this system's package manager"


def _version(distributions: Iterable[str]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
