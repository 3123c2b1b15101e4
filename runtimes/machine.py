# SPDX-License-Identifier: Apache-2.0
"""What is here to run on, and for each thing that is missing the command that brings it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that decide how fast (and for int8, how exactly) a CPU runs a model.
_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)

# What each part of the work needs; any of the distributions will do, the first is what we would install.
_NEEDS = (
    ("run (target ort-cpu)", ("onnxruntime", "onnxruntime-gpu")),
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
    """One line of the report; ``fix`` is the command to type, empty where nothing is missing."""

    what: str
    needed_for: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Device:
    """A target that this machine can run."""

    target: str
    name: str
    engine: str


def devices() -> tuple[Device, ...]:
    """Targets that are present, in the order in which ``device="auto"`` takes them."""
    version = _version(("onnxruntime", "onnxruntime-gpu"))
    return (Device("ort-cpu", cpu_name(), f"onnxruntime {version}"),) if version else ()


def doctor() -> tuple[Finding, ...]:
    """Everything that a run, validation or export on this machine depends on."""
    findings = [
        Finding("Python", "everything", platform.python_version()),
        Finding("CPU", "ort-cpu", f"{cpu_name()}, {available_cores()} cores available"),
        Finding("CPU features", "ort-cpu", " ".join(cpu_features()) or "none of note found"),
    ]
    for needed_for, distributions in _NEEDS:
        version = _version(distributions)
        fix = "" if version else f"{sys.executable} -m pip install {distributions[0]}"
        findings.append(Finding(distributions[0], needed_for, version or "not installed", fix))
    return tuple(findings)


def cpu_name() -> str:
    """The CPU's model name as Linux tells it, else its architecture."""
    for line in _cpuinfo():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Those of the instruction sets of note that this CPU has."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            flags = set(line.split(":", 1)[1].split())
            return tuple(feature for feature in _FEATURES if feature in flags)
    return ()


def saturates(machine: str | None = None, features: tuple[str, ...] | None = None) -> bool:
    """Whether integer kernels add products of uint8 and int8 in 16 bits, where two of them overflow.

    x86 CPUs without VNNI (or AMX) do: `vpmaddubsw` saturates at 32,767, and 2 × 255 × 127 is 64,770. Models for them
    need weights of 7 bits. By default this machine is asked.
    """
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64", "i686"):
        return False
    found = cpu_features() if features is None else features
    return not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(found)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo() -> Iterable[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()


def _version(distributions: Iterable[str]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
