# SPDX-License-Identifier: Apache-2.0
"""Find the targets that can run here, and choose one for ``device="auto"``."""

from __future__ import annotations

import contextlib
import logging
import shlex
import subprocess
import sys
from typing import get_args

import msgspec

from perceiver_export.runtimes import exits
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.certificates import Certificate, applies, certificates, may_be, on_cpu
from perceiver_export.runtimes.engines.backend import (
    TARGETS,
    EngineOptions,
    Precision,
    PrecisionChoice,
    Target,
    find_target,
)
from perceiver_export.runtimes.engines.cache import make_source
from perceiver_export.runtimes.engines.cuda import cuda_gpus
from perceiver_export.runtimes.errors import DeviceError, MissingDependencyError, PerceiverExportError
from perceiver_export.runtimes.figures import Times, median_latency, relative_times
from perceiver_export.runtimes.machine import cpu_features, device_files
from perceiver_export.runtimes.manifest import Manifest, judged_output
from perceiver_export.runtimes.opening import engine_for

_log = logging.getLogger(__name__)

_CPU_TARGETS = ("ort-cpu", "openvino-cpu")
# The instruction sets for each 16-bit precision; bf16 first, because AMX multiplies whole tiles in it.
_NATIVE: dict[Precision, set[str]] = {
    "bf16": {"amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16"},
    "fp16": {"amx_fp16", "avx512_fp16", "asimdhp"},
}
_DEVICE_FILES = {"Intel GPU": "dri/renderD*", "Intel NPU": "accel/accel*"}


class Device(msgspec.Struct, frozen=True):
    """A target that this machine can run."""

    target: str
    name: str
    engine: str


class Presence(msgspec.Struct, frozen=True):
    """The device on which a target would run here, or why it cannot run and how to fix that."""

    device: Device | None
    problem: str = ""
    fix: str = ""


@exits.awaited
def presence(target: Target) -> Presence:
    """Whether a target can run here, according to its library, which is imported."""
    exits.enter()
    try:
        platform = target.backend().platform(target.name, EngineOptions())
    except (DeviceError, MissingDependencyError) as error:
        return Presence(None, error.message, error.hint)
    return Presence(Device(target.name, platform.device, f"{platform.library} {platform.version}"))


def presence_apart(target: Target) -> Presence:
    """`presence` in its own process, because some libraries end the process if a driver is missing."""
    # `-m` would let a file in the current directory replace a library.
    code = (
        f"import sys, msgspec; sys.path.pop(0); from {__name__} import TARGETS, presence;"
        " print(msgspec.json.encode(presence(TARGETS[sys.argv[1]])).decode())"
    )
    done = subprocess.run([sys.executable, "-c", code, target.name], capture_output=True, text=True, check=False)
    try:
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=Presence)
    except (IndexError, msgspec.DecodeError):
        died = f"its library ends the process: {done.stderr.strip()[-200:] or f'exit code {done.returncode}'}"
        return Presence(None, died, f"{sys.executable} -m pip install --force-reinstall {target.distributions[0]}")


def devices() -> tuple[Device, ...]:
    """The targets that can run here, in the order in which ``device="auto"`` tries them."""
    found = (presence(target).device for target in TARGETS.values() if target.version())
    return tuple(device for device in found if device is not None)


def choose_target(bundle: Bundle, precision: PrecisionChoice | None = None, threads: int | None = None) -> str:
    """The target for ``device="auto"``.

    It is the first target for which a certificate of the bundle is valid here. Without one, it is the first target in
    the table that is present and, if compiling takes minutes, has an engine for this machine. Of the two CPU targets,
    the one that `bench --save` measured to be faster here, in the bundle's own precision and with the same ``threads``,
    comes first; without such figures, ort-cpu. A target that computes only in a lower precision needs a certificate,
    unless ``precision`` asks for it. ``precision`` and ``threads`` are the engine's, as in `load`.

    Raises MissingDependencyError: no target is present.
    """
    names = [name for name, target in TARGETS.items() if name not in _CPU_TARGETS and _worth_asking(target)]
    cpus = [name for name in _CPU_TARGETS if TARGETS[name].version()]
    measured = {name: median_latency(bundle, name, threads) for name in cpus}
    names += sorted(cpus, key=lambda name: (measured[name] is None, measured[name] or 0.0))
    written = {one.target for one in certificates(bundle)}
    for name in sorted(written, key=lambda name: (names.index(name) if name in names else len(names), name)):
        asked = choose_precision(bundle, name, threads) if precision == "auto" else precision
        if certificates_for(bundle, name, asked):
            _log.info("%s: auto chose %s, which is certified here", bundle.path, name)
            return name
    if written:
        _log.info("%s: none of the certificates for %s is valid here", bundle.path, ", ".join(sorted(written)))
    for name in names:
        why = _why_not(bundle, TARGETS[name], precision)
        _log.info("%s: auto %s %s%s", bundle.path, "rejected" if why else "chose", name, f": {why}" if why else "")
        if not why:
            return name
    if not cpus:
        raise MissingDependencyError("no installed engine can run here", TARGETS["ort-cpu"].install)
    return next(name for name in names if name in cpus)  # `load` reports the problem


def choose_precision(
    bundle: Bundle, target: str, threads: int | None = None, options: EngineOptions | None = None
) -> Precision:
    """The precision for ``precision="auto"``: the fastest with a certificate that is valid here, else fp32.

    It must be one that `bench --precision auto --save` found faster than fp32 here, in three quarters of the pairs of
    blocks and with the same ``threads``. ``options`` are those of the engines that `build` will make; None means the
    engines that `load` would use.
    """
    faster = _faster(relative_times(bundle.path, target, threads))
    chosen: Precision = next((one for one in faster if certificates_for(bundle, target, one, options)), "fp32")
    _log.info("%s: auto is %s on %s, faster than fp32: %s", bundle.path, chosen, target, ", ".join(faster) or "none")
    return chosen


def _faster(times: Times) -> tuple[Precision, ...]:
    """Precisions that were measured to be faster than fp32, the fastest first."""
    found = (precision for precision in get_args(Precision) if precision in times and times[precision][2] < 1)
    return tuple(sorted(found, key=lambda precision: times[precision][1]))


def precision_advice(bundle: Bundle, target: str, threads: int | None = None) -> str:
    """One line on a precision that is or may be faster than fp32 on a target, with the command to measure or use it.

    Empty if the target has none, or if `bench --precision auto --save` found none.
    """
    name, times = shlex.quote(str(bundle.path)), relative_times(bundle.path, target, threads)
    faster = _faster(times)
    if not times:
        lower = find_target(target).backend().precisions(target)
        native = _native() if on_cpu(target) else ()
        faster = tuple(dict.fromkeys(one for one in (*native, *lower) if one in lower))
    if not faster:
        return ""
    on = f"{name} --device {target}" + (f" --threads {threads}" if threads else "")
    if not times:
        return f"{faster[0]} may be faster; to measure it: perceiver-export bench {on} --precision auto --save"
    found = f"{faster[0]} takes {times[faster[0]][1]:.2f} × the time of {bundle.manifest.precision} on {target}"
    if choose_precision(bundle, target, threads) == faster[0]:
        return f"{found}, and is certified: --precision auto uses it"
    against = name if bundle.manifest.precision == "fp32" else "FP32_BUNDLE"  # a quantized reference certifies nothing
    check = f"perceiver-export validate {on} --precision {faster[0]} --data DATA --against {against}"
    return f"{found}; to certify it: {check} {_gate(bundle.manifest)} --certify"


def _native() -> tuple[Precision, ...]:
    """The 16-bit precisions that this CPU has instructions for, the fastest first."""
    return tuple(precision for precision, instructions in _NATIVE.items() if instructions & set(cpu_features()))


def _gate(manifest: Manifest) -> str:
    """A gate of `validate` for answers that are right or wrong; for other answers, only the user knows the limit."""
    judged, task = judged_output(manifest), manifest.task
    right = task != "video-autoencoding" and judged is not None and judged[1] != "regression"
    return "--max-drop 1" if right or task == "fill-mask" else "--max-metric-change LIMIT"


def advice_here(bundle: Bundle, target: str = "", threads: int | None = None) -> str:
    """`precision_advice` for a target; for a CPU with 16-bit instructions, the first advice for any of its targets.

    Empty if a library does not load, because missing advice must not fail a command.
    """
    names = _CPU_TARGETS if target in ("", *_CPU_TARGETS) else (target,)
    if names is _CPU_TARGETS and not _native():
        return ""
    for name in names:
        with contextlib.suppress(PerceiverExportError):
            if find_target(name).version() and (advice := precision_advice(bundle, name, threads)):
                return advice
    return ""


def certificates_for(
    bundle: Bundle, target: str, precision: Precision | None = None, new: EngineOptions | None = None
) -> tuple[Certificate, ...]:
    """The certificates that are valid here for the engines that `load` would run on a target, or for ``new`` ones.

    No engine is loaded, and no library is imported for a target without a certificate. Raises BundleError:
    calibration.json cannot be read.
    """
    written = [one for one in certificates(bundle) if one.target == target]
    if not written or not _worth_asking(known := find_target(target)):
        return ()
    try:
        here = known.backend().platform(target, EngineOptions())
        options = msgspec.structs.replace(new or EngineOptions(), precision=precision or "fp32")
        used = [options]
        if new is None:
            used = [engine_for(bundle, name, target, options, precision)[0].options for name in bundle.manifest.parts]
    except PerceiverExportError as error:
        _log.debug("%s cannot run on %s here: %s", bundle.path, target, error.message)
        return ()
    if known.computes:
        used = [msgspec.structs.replace(part, precision=known.computes) for part in used]
    engine = f"{here.library} {here.version}"
    return tuple(
        one
        for one in written
        if all(may_be(one.engine, engine, part) for part in used) and applies(one, bundle, target, one.engine)
    )


def _worth_asking(target: Target) -> bool:
    """Whether to import the target's library. A useless import would slow down the start of every app."""
    if not target.version():
        return False
    if target.hardware == "NVIDIA GPU":
        return bool(cuda_gpus())
    return target.hardware not in _DEVICE_FILES or bool(device_files(_DEVICE_FILES[target.hardware]))


def _why_not(bundle: Bundle, target: Target, precision: PrecisionChoice | None) -> str:
    """Why a target cannot run the bundle; empty if it can. Libraries of CPU targets are not imported."""
    if target.computes not in (None, precision):
        return f"it computes in {target.computes}, which is neither certified nor asked for"
    if target.name not in _CPU_TARGETS and (problem := presence(target).problem):
        return problem
    try:
        for name, part in bundle.manifest.parts.items():
            if not target.needs_engine:
                make_source(bundle, part, target.name, EngineOptions())
            elif engine_for(bundle, name, target.name, EngineOptions(), None)[1] is None:
                return f"no engine of {name} was built for it here"
    except PerceiverExportError as error:  # such as a quantized bundle without a graph for this target
        return error.message
    return ""
