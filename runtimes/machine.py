# SPDX-License-Identifier: Apache-2.0
"""The machine as Linux describes it: CPU, cores, JetPack, device files."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

# Instruction sets that decide how fast a CPU runs a model, and in which types it computes: int8's sums, bf16, fp16.
_FEATURES = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "avx_ne_convert", "avx512_bf16"),
    *("avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve"),
)


@functools.cache
def _cpuinfo(*fields: str) -> str:
    """The first value of these fields in /proc/cpuinfo."""
    found = re.search(rf"^(?:{'|'.join(fields)})\s*:(.*)", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1].strip() if found else ""


def cpu_name() -> str:
    """The CPU's model name, else its architecture."""
    return _cpuinfo("model name", "Model") or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """The instruction sets of this CPU, of those that matter to a model."""
    flags = set(_cpuinfo("flags", "Features").split())
    return tuple(feature for feature in _FEATURES if feature in flags)


def saturates(machine: str | None = None, features: tuple[str, ...] | None = None) -> bool:
    """Whether integer kernels add products of uint8 and int8 in 16 bits, where two of them overflow.

    x86 CPUs without VNNI (or AMX) do: `vpmaddubsw` saturates at 32,767, and 2 × 255 × 127 is 64,770. Models for them
    need weights of 7 bits. The default is this machine.
    """
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64", "i686"):
        return False
    found = cpu_features() if features is None else features
    return not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(found)


def peak_memory() -> float:
    """Largest resident size of this process in MiB."""
    if found := re.search(r"^VmHWM:\s*(\d+)", _text(Path("/proc/self/status")), re.MULTILINE):
        return int(found[1]) / 1024
    import resource  # its figure survives exec, so it starts with the parent's

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def jetson_linux(release: Path = Path("/etc/nv_tegra_release")) -> str:
    """Version of Jetson Linux (L4T), "36.4.3"; empty elsewhere. JetPack 6 is 36, JetPack 7 is 38 and 39."""
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text(release))
    return f"{found[1]}.{found[2]}" if found else ""


def board() -> str:
    """The board's name in the device tree ("NVIDIA Jetson Orin Nano Developer Kit"); empty if there is none."""
    return _text(Path("/proc/device-tree/model")).rstrip("\0\n")


def device_files(pattern: str) -> tuple[str, ...]:
    """Device files of /dev that match: ``dri/renderD*`` are GPUs, ``accel/accel*`` NPUs."""
    return tuple(sorted(map(str, Path("/dev").glob(pattern))))


def pci_devices(vendor: str, kind: str, root: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether there is a PCI device of that vendor (``0x10de``) whose class begins with ``kind`` (``0x03``: a display,
    ``0x12``: an accelerator), with a driver or without.
    """
    devices = ((_text(device / "vendor").strip(), _text(device / "class")) for device in root.glob("*"))
    return any(found == vendor and pci_class.startswith(kind) for found, pci_class in devices)


def linux_distribution(release: Path = Path("/etc/os-release")) -> str:
    """ID and ID_LIKE of /etc/os-release, "ubuntu debian"; empty if there is none."""
    return " ".join(re.findall(r"^ID(?:_LIKE)?=\"?([^\"\n]*)", _text(release), re.MULTILINE))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
