# SPDX-License-Identifier: Apache-2.0
"""Facts about the machine from Linux: CPU, cores, JetPack, device files."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

# Instruction sets that decide how fast a CPU runs a model and in which types it computes: int8 sums, bf16, fp16.
_FEATURES = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "avx_ne_convert", "avx512_bf16"),
    *("avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve"),
)


@functools.cache
def _cpuinfo(*fields: str) -> str:
    """The first value of any of these fields in /proc/cpuinfo."""
    found = re.search(rf"^(?:{'|'.join(fields)})\s*:(.*)", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1].strip() if found else ""


def cpu_name() -> str:
    """The CPU's model name, or its architecture if the name is unknown."""
    return _cpuinfo("model name", "Model") or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """This CPU's instruction sets that matter to a model."""
    flags = set(_cpuinfo("flags", "Features").split())
    return tuple(feature for feature in _FEATURES if feature in flags)


def saturates(machine: str | None = None, features: tuple[str, ...] | None = None) -> bool:
    """Whether integer kernels add products of uint8 and int8 in 16 bits, where two products overflow.

    x86 CPUs without VNNI or AMX do so: `vpmaddubsw` saturates at 32,767, but 2 × 255 × 127 is 64,770. Models for them
    need 7-bit weights. The default is this machine.
    """
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64", "i686"):
        return False
    found = cpu_features() if features is None else features
    return not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(found)


def peak_memory() -> float:
    """The peak resident size of this process in MiB."""
    if found := re.search(r"^VmHWM:\s*(\d+)", _text(Path("/proc/self/status")), re.MULTILINE):
        return int(found[1]) / 1024
    import resource  # only as a fallback: its figure survives exec, so it includes the parent's peak

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def jetson_linux(release: Path = Path("/etc/nv_tegra_release")) -> str:
    """The version of Jetson Linux (L4T), such as "36.4.3"; empty elsewhere. JetPack 6 is 36; JetPack 7 is 38 and 39."""
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text(release))
    return f"{found[1]}.{found[2]}" if found else ""


def board() -> str:
    """The board's name from the device tree ("NVIDIA Jetson Orin Nano Developer Kit"); empty without one."""
    return _text(Path("/proc/device-tree/model")).rstrip("\0\n")


def device_files(pattern: str) -> tuple[str, ...]:
    """Device files in /dev that match a pattern: ``dri/renderD*`` are GPUs, ``accel/accel*`` NPUs."""
    return tuple(sorted(map(str, Path("/dev").glob(pattern))))


def pci_devices(vendor: str, kind: str, root: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether the machine has a PCI device of that vendor (such as ``0x10de``) whose class starts with ``kind``
    (``0x03``: a display, ``0x12``: an accelerator), with or without a driver.
    """
    devices = ((_text(device / "vendor").strip(), _text(device / "class")) for device in root.glob("*"))
    return any(found == vendor and pci_class.startswith(kind) for found, pci_class in devices)


def linux_distribution(release: Path = Path("/etc/os-release")) -> str:
    """ID and ID_LIKE from /etc/os-release, such as "ubuntu debian"; empty without that file."""
    return " ".join(re.findall(r"^ID(?:_LIKE)?=\"?([^\"\n]*)", _text(release), re.MULTILINE))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
