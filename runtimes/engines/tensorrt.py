# SPDX-License-Identifier: Apache-2.0
"""TensorRT on NVIDIA GPUs and Jetsons (`tensorrt`); TensorRT for RTX (`tensorrt-rtx`), which compiles without a GPU.

The driver is checked first, because TensorRT's runtime ends the process without one.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from perceiver_export.runtimes.engines.backend import EngineOptions, Platform, Precision, Progress, Source, find_target
from perceiver_export.runtimes.engines.cuda import cuda_gpus, driver_version
from perceiver_export.runtimes.engines.flags import Flags, Values
from perceiver_export.runtimes.engines.tensorrt_build import ENGINE, build_engine, rtx_gpus
from perceiver_export.runtimes.engines.tensorrt_engine import TensorrtEngine
from perceiver_export.runtimes.engines.tensorrt_versions import capabilities
from perceiver_export.runtimes.errors import DeviceError, MissingDependencyError

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_FLAGS: Flags = {
    "workspace": Values(r"[0-9]{1,19}\s*[KMG]?(i?B)?", "a size such as 512MiB"),
    "optimization_level": Values("[0-5]", "0 (fast to build) to 5 (fast to run)"),
}
_CROSSED: Flags = {**_FLAGS, "compute_capability": Values("[A-Za-z0-9_, ]{1,200}", "names such as sm86,sm89")}
_FIRST_BF16 = (8, 0)  # compute capability: Ampere
_NO_BF16 = ("75",)  # among the GPUs that TensorRT for RTX supports
# The apt packages of libraries that TensorRT's import may miss, from JetPack or NVIDIA.
_PACKAGES = {"nvinfer": "libnvinfer", "nvinfer_plugin": "libnvinfer-plugin", "nvonnxparser": "libnvonnxparsers"}


def platform(target: str, options: EngineOptions) -> Platform:
    """The library and the GPU; for a cross-build (tensorrt-rtx with compute_capability), the GPUs it targets.

    Raises MissingDependencyError; DeviceError: no driver, no GPU, or a GPU without the precision.
    """
    crossed = options.flags.get("compute_capability", "") if target == "tensorrt-rtx" else ""
    gpus = cuda_gpus()
    if not crossed and not gpus:
        import_library(target)  # a missing library is the first thing to fix
        raise DeviceError(
            f"{target} found no NVIDIA GPU: the CUDA driver is missing or does not start",
            "install the driver (on a Jetson: JetPack), or build for another machine's GPU with --target tensorrt-rtx"
            " --flag compute_capability=sm86,sm89",
        )
    trt = import_library(target)
    can = capabilities(target, trt.__version__)
    if target == "tensorrt-rtx" and not crossed:
        known = rtx_gpus(trt)
        if _architecture(gpus[0].name) not in known:  # TensorRT itself gives no error
            raise DeviceError(
                f"{can.name} supports {', '.join(known)}, but not {gpus[0].name}", "use --target tensorrt"
            )
    device = " ".join(sorted({part.strip().lower() for part in crossed.split(",")})) if crossed else gpus[0].name
    lacking = [gpu.name for gpu in gpus[:1] if gpu.compute_capability < _FIRST_BF16]
    if crossed:
        lacking = [name for name in device.split() if name.removeprefix("sm") in _NO_BF16]
    if lacking and options.precision == "bf16":
        raise DeviceError(f"{lacking[0]} does not support bf16", "use --precision fp16")
    return Platform(library=target, version=trt.__version__, device=device, driver=driver_version())


def differences(built: Platform, here: Platform) -> tuple[str, ...]:
    """An engine is bound to the library's version and the kind of GPU, but not to the driver."""
    found = []
    if (built.library, built.version) != (here.library, here.version):
        found.append(f"it was built with {built.library} {built.version}, but this is {here.library} {here.version}")
    if built.device != here.device and _architecture(here.device) not in built.device.split():
        found.append(f"it was built for {built.device}, but this is {here.device}")
    return tuple(found)


def flags(target: str) -> Flags:
    """The flags of `build_engine`. Only TensorRT for RTX can build for other machines' GPUs."""
    return _CROSSED if target == "tensorrt-rtx" else _FLAGS


def precisions(target: str) -> tuple[Precision, ...]:
    """fp16, and bf16 on GPUs that have it; empty without a GPU."""
    has_bf16 = [gpu.compute_capability >= _FIRST_BF16 for gpu in cuda_gpus()[:1]]
    return ("fp16", "bf16") if any(has_bf16) else ("fp16",) if has_bf16 else ()


def compile(source: Source, directory: Path, progress: Progress) -> None:
    """Write model.engine and layers.json. Raises BuildError, BundleError, DeviceError, MissingDependencyError."""
    here = platform(source.target, source.options)
    trt = import_library(source.target)
    build_engine(trt, capabilities(source.target, trt.__version__), here, source, directory, progress)


def open(source: Source, directory: Path | None, threads: int | None) -> TensorrtEngine:
    """Open an engine that `compile` wrote. Raises DeviceError (no driver, no memory), EngineError."""
    here = platform(source.target, EngineOptions())
    assert directory is not None  # the table says that this target needs an engine
    return TensorrtEngine(import_library(source.target), here, source, directory / ENGINE)


def import_library(target: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. Raises MissingDependencyError: it or one of its libraries is missing."""
    try:
        return importlib.import_module(_MODULES[target])
    except (ImportError, OSError) as error:
        hint = find_target(target).install
        missing = re.search(r"lib(\w+)\.so\.(\d+)", str(error))
        if missing and missing[1] in _PACKAGES:
            hint = f"on a Jetson: sudo apt install {_PACKAGES[missing[1]]}{missing[2]}; elsewhere: {hint}"
        elif target == "tensorrt":
            hint += "; on a Jetson, use JetPack's: create the environment with `python3 -m venv --system-site-packages`"
        raise MissingDependencyError(f"target {target} needs {_MODULES[target]}: {error}", hint) from error


def _architecture(device: str) -> str:
    """`NVIDIA RTX A4000 (sm_86)` -> `sm86`, the name in a cross-build."""
    found = re.search(r"\(sm_(\d+)\)", device)
    return f"sm{found[1]}" if found else ""
