# SPDX-License-Identifier: Apache-2.0
"""The machine as its operating system tells of it: CPU, cores, JetPack, device files."""

from __future__ import annotations

import functools
import os
import platform
import re
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


@functools.cache
def cpu_name() -> str:
    """The CPU's model name as Linux tells it, else its architecture."""
    for line in _cpuinfo():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.machine()


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """Those of the instruction sets of note that this CPU has."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            flags = set(line.split(":", 1)[1].split())
            return tuple(feature for feature in _FEATURES if feature in flags)
    return ()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jetson_linux(release: Path = Path("/etc/nv_tegra_release")) -> str:
    """Version of Jetson Linux (L4T), "36.4.3"; empty elsewhere. JetPack 6 is 36, JetPack 7 is 38 and 39."""
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _first_line(release))
    return f"{found[1]}.{found[2]}" if found else ""


def board() -> str:
    """What the device tree calls this board ("NVIDIA Jetson Orin Nano Developer Kit"); empty where there is none."""
    return _first_line(Path("/proc/device-tree/model")).rstrip("\0")


def device_files(pattern: str) -> tuple[str, ...]:
    """Device files of /dev that match: ``dri/renderD*`` are GPUs, ``accel/accel*`` NPUs."""
    return tuple(sorted(str(path) for path in Path("/dev").glob(pattern)))


def pci_devices(vendor: str, kinds: tuple[str, ...], root: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether there is a PCI device of that vendor (``0x10de``) whose class begins with one of ``kinds`` (``0x03``: a
    display, ``0x12``: an accelerator), with a driver or without.
    """
    return any(
        _first_line(device / "vendor") == vendor and _first_line(device / "class").startswith(kinds)
        for device in root.glob("*")
    )


def linux_distribution(release: Path = Path("/etc/os-release")) -> str:
    """ID of /etc/os-release and what it is like, "ubuntu debian"; empty where there is none."""
    try:
        text = release.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return " ".join(re.findall(r"^ID(?:_LIKE)?=\"?([^\"\n]*)", text, re.MULTILINE))


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return ""


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
