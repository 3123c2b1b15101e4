# SPDX-License-Identifier: Apache-2.0
"""Report what this machine can run, and for each missing component the command that installs it here."""

from __future__ import annotations

import os
import platform
import sys

import msgspec

from perceiver_export.runtimes.engines.backend import TARGETS, Target, installed_version
from perceiver_export.runtimes.engines.cuda import cuda_gpus, driver_version
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
_PIP = f"{sys.executable} -m pip"

# By hardware: its target, PCI class, device files and system package.
_INTEL_DEVICES = {
    "Intel GPU": ("openvino-gpu", _DISPLAY, "dri/renderD*", "intel-opencl-icd"),
    "Intel NPU": ("openvino-npu", _ACCELERATOR, "accel/accel*", "intel-level-zero-npu"),
}
# By Python package, the commands that need it.
_NEEDS = {
    "pillow": "read and resize images",
    "tokenizers": "run and validate a model with a tokenizer.json",
    "scipy": "validate",
    "scikit-image": "validate a model of video",
    "jinja2": "report",
    **dict.fromkeys(("torch", "onnx", "onnx-ir", "onnxscript", "safetensors"), "export"),
    "transformers": "export --use-transformers",
    "huggingface_hub": "export OWNER/NAME, from the hub",
}
_FEDORA = {"nvidia-driver": "akmod-nvidia", "intel-opencl-icd": "intel-compute-runtime"}


class Finding(msgspec.Struct, frozen=True):
    """One line of the report. ``fix`` is a command; it is empty if nothing is missing or no command would help.

    ``device`` is set for a target that runs here.
    """

    what: str
    needed_for: str
    found: str
    fix: str = ""
    device: Device | None = None


def doctor() -> tuple[Finding, ...]:
    """Check everything on which a run, validation or export on this machine depends."""
    cpu = "targets on the CPU"
    findings = [
        Finding("Python", "everything", platform.python_version()),
        Finding("system", "everything", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Finding("CPU", cpu, f"{cpu_name()}, {available_cores()} cores available"),
        Finding("CPU features", cpu, " ".join(cpu_features()) or "no relevant ones"),
    ]
    if release := jetson_linux():
        jetpack = _JETPACK.get(release.partition(".")[0], "an unknown JetPack")
        found = f"{board() or 'unnamed board'}, {jetpack} (L4T {release})"
        findings.append(Finding("Jetson", "tensorrt", found))
    hardware = {"NVIDIA GPU": _nvidia(), **{name: _intel(name) for name in _INTEL_DEVICES}}
    findings += [*hardware.values(), *(_target(target, hardware.get(target.hardware)) for target in TARGETS.values())]
    for name, needed_for in _NEEDS.items():
        version = installed_version(name)
        fix = "" if version else f"{_PIP} install {name}"
        findings.append(Finding(name, needed_for, version or "not installed", fix))
    return tuple(findings)


def _nvidia() -> Finding:
    found, fix = "present, without a working driver", _install("nvidia-driver")
    if gpus := cuda_gpus():
        listed = ", ".join(f"{gpu.name} {gpu.memory / 2**30:.0f} GiB" for gpu in gpus)
        found, fix = f"{listed}; driver for CUDA {driver_version()}", ""
    elif jetson_linux():
        found, fix = "the driver does not start", "sudo apt install --reinstall nvidia-jetpack"
    elif not pci_devices(_NVIDIA, _DISPLAY):
        found, fix = "none", ""
    return Finding("NVIDIA GPU", "tensorrt, tensorrt-rtx, ort-cuda", found, fix)


def _intel(hardware: str) -> Finding:
    target, pci_class, pattern, package = _INTEL_DEVICES[hardware]
    files = device_files(pattern)
    found, fix = ", ".join(files), ""
    if not pci_devices(_INTEL, pci_class):
        found = "none"
    elif not files:
        found, fix = "present, without a kernel driver", _install(package)
    elif not any(os.access(file, os.R_OK | os.W_OK) for file in files):
        found, fix = f"no permission to open {found}", "sudo usermod -aG render $USER, and log in again"
    return Finding(hardware, target, found, fix)


def _target(target: Target, hardware: Finding | None) -> Finding:
    """Whether a target runs, and if not, how to fix it if the hardware is present. ``hardware`` is None for the CPU."""
    device, fix = None, ""
    if hardware is not None and hardware.found == "none":
        crossed = target.name == "tensorrt-rtx" and target.version()
        compiles = "; can build for other machines (--flag compute_capability=sm86)" if crossed else ""
        found = f"no {target.hardware}{compiles}"
    elif hardware is not None and hardware.fix:
        found, fix = f"{target.hardware}: {hardware.found}", hardware.fix
    elif not target.version():
        found, fix = "not installed", _library(target)
    else:
        present = presence_apart(target)
        found, fix, device = present.problem, present.fix, present.device
        if device is not None:
            library, _, version = device.engine.partition(" ")
            found = f"{library} {version.partition('-')[0]} on {device.name}"  # OpenVINO's version includes its commit
        elif target.module != "tensorrt":
            intel = _INTEL_DEVICES.get(target.hardware)
            fix = _install(intel[-1]) if intel else _library(target)
    return Finding(f"target {target.name}", f"run on the {target.hardware}", found, fix, device)


def _library(target: Target) -> str:
    """The command that installs a target's library into this Python."""
    if target.name == "ort-cuda":
        if jetson_linux():
            return "use the target tensorrt: PyPI has no onnxruntime for a Jetson's GPU"
        return f"{_PIP} uninstall -y onnxruntime && {_PIP} install onnxruntime-gpu"
    if target.name == "tensorrt" and jetson_linux():
        return "sudo apt install nvidia-jetpack, and create the environment with python3 -m venv --system-site-packages"
    return f"{_PIP} install {target.distributions[0]}{target.from_index}"


def _install(package: str) -> str:
    """This system's command for a package, under the distribution's name for it."""
    family = linux_distribution().split()
    if package == "intel-level-zero-npu":
        return "install the packages of https://github.com/intel/linux-npu-driver/releases"
    if "ubuntu" in family and package == "nvidia-driver":
        return "sudo ubuntu-drivers install"
    if "debian" in family:
        return f"sudo apt install {package}"
    if "fedora" in family or "rhel" in family:
        return f"sudo dnf install {_FEDORA[package]}"
    return f"install {package} with this system's package manager"
