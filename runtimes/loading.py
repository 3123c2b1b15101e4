# SPDX-License-Identifier: Apache-2.0
"""From a bundle, or a bare ONNX file, to a `Runtime` on a target."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec

from perceiver_export.runtimes.bundle import Bundle, Verify, open_bundle
from perceiver_export.runtimes.engines.backend import Backend, Engine, EngineOptions, Hint, Precision, Source
from perceiver_export.runtimes.engines.cache import Candidate, candidates, check_engine, unreadable
from perceiver_export.runtimes.engines.records import identify, make_source
from perceiver_export.runtimes.engines.targets import Target, find_target
from perceiver_export.runtimes.errors import BundleError, DeviceError, EngineError, UsageError, check_choice
from perceiver_export.runtimes.manifest import TensorSpec
from perceiver_export.runtimes.runtime import Runtime

_log = logging.getLogger(__name__)

_MOST_THREADS = 1024  # onnxruntime starts as many as it is told, for minutes if they are thousands


@dataclass(frozen=True)
class _Wish:
    """What the caller of `load` asked for, the same for every part."""

    device: str
    threads: int | None
    verify: Verify
    precision: Precision | None
    hint: Hint
    check_finite: bool


def load(
    bundle: str | os.PathLike[str] | Bundle,
    device: str = "auto",
    part: str | None = None,
    threads: int | None = None,
    verify: Verify = "auto",
    *,
    precision: Precision | None = None,
    hint: Hint = "latency",
    check_finite: bool = False,
) -> Runtime:
    """Load a bundle for running.

    A split bundle's ``part`` is one of its parts; None joins them behind one `run`, which decodes every query.
    ``device`` is a target or ``auto`` (see `choose_target`); a named device is used or refused, never replaced.
    ``threads`` are the engine's; None leaves the choice to it. ``precision`` None takes the engine that was built last,
    whatever its precision, and fp32 where none was built; ``hint`` says what to compile for, an answer soon or many
    answers. With ``check_finite`` NaN and infinity are refused, in what goes in and in what comes out.

    An engine that `build` made is used if it was made for what is here. Where it was not, targets that compile in
    seconds compile (a warning is logged, `Runtime.describe` says so), the others refuse.

    Raises BundleError, DeviceError, EngineError, MissingDependencyError, UsageError.
    """
    check_threads(threads)
    check_choice("hint", hint, get_args(Hint))
    if precision is not None:
        check_choice("precision", precision, get_args(Precision))
    opened = open_bundle(bundle, verify)
    _check_arithmetic(opened)
    if device == "auto":
        from perceiver_export.runtimes.presence import choose_target

        device = choose_target(opened)
    wish = _Wish(device, threads, verify, precision, hint, check_finite)
    if part is not None or not opened.split:
        return _load_part(opened, part, wish)
    from perceiver_export.runtimes.joined import join

    return join(opened.manifest, {name: _load_part(opened, name, wish) for name in opened.manifest.parts})


def _certificates(bundle: Bundle, engine: Engine) -> tuple[str, ...]:
    """What was certified and holds on this engine and CPU."""
    if "calibration.json" not in bundle.manifest.files:
        return ()
    from perceiver_export.runtimes.certificates import engine_of, valid_certificates

    described = {"precision": bundle.manifest.precision, **engine.describe()}
    return tuple(map(str, valid_certificates(bundle, described["target"], engine_of(described))))


def load_onnx(path: str | os.PathLike[str], device: str = "auto", threads: int | None = None) -> Runtime:
    """Load a bare ONNX file, to compare with it. Its own description of inputs and outputs is believed."""
    engine = open_engine(Path(path), "ort-cpu" if device == "auto" else device, threads)
    return Runtime(engine, engine.inputs, engine.outputs, "unknown")


def open_engine(path: Path, device: str, threads: int | None) -> Engine:
    """Compile a graph for a target. Raises DeviceError, EngineError, MissingDependencyError, UsageError."""
    check_threads(threads)
    target = find_target(device)
    if target.needs_engine:
        raise EngineError(
            f"{device} compiles for minutes, which is not done for a bare ONNX file",
            "make a bundle of it with `perceiver-export export`, then `perceiver-export build`",
        )
    backend = target.backend()
    backend.platform(device, EngineOptions())
    return backend.open(Source(target=device, graph=path), None, threads)


def find_engine(
    bundle: Bundle, part: str, source: Source, backend: Backend, precision: Precision | None
) -> tuple[Candidate | None, tuple[Candidate, ...]]:
    """The engine to use, and those of this target and wish that are not for here; without deserialising any.

    Raises what the backend's `platform` raises.
    """
    here = identify(bundle, part, source, backend.platform(source.target, source.options))
    stale = []
    for candidate in candidates(bundle, here, backend):
        options = candidate.record.identity.options
        if options.hint != source.options.hint or (precision is not None and options.precision != precision):
            continue
        if not candidate.problems:
            return candidate, ()
        stale.append(candidate)
    return None, tuple(stale)


def _load_part(bundle: Bundle, name: str | None, wish: _Wish) -> Runtime:
    part = bundle.part(name)
    key = next(key for key, value in bundle.manifest.parts.items() if value is part)
    target = find_target(wish.device)
    backend = target.backend()
    options = EngineOptions(precision=wish.precision or "fp32", hint=wish.hint)
    source = make_source(bundle, part, target.name, options)
    found, stale = find_engine(bundle, key, source, backend, wish.precision)
    if found is not None:
        _check_whole(bundle, found, wish)
        source = msgspec.structs.replace(source, options=found.record.identity.options)
        compiled = str(found.directory)
    else:
        compiled = _at_load(bundle, target, stale, options)
    if stale:
        source = msgspec.structs.replace(source, options=stale[0].record.identity.options)
    engine = backend.open(source, found.directory if found else None, wish.threads)
    for ours, theirs in ((part.inputs, engine.inputs), (part.outputs, engine.outputs)):
        if {_signature(spec) for spec in ours} != {_signature(spec) for spec in theirs}:
            raise BundleError(
                f"{source.graph.name} takes or gives other tensors than the manifest says", "export the bundle again"
            )
    precision = bundle.manifest.precision
    return Runtime(
        engine,
        part.inputs,
        part.outputs,
        precision,
        part.num_queries,
        compiled=compiled,
        check_finite=wish.check_finite,
        certificates=_certificates(bundle, engine),
    )


def _check_whole(bundle: Bundle, found: Candidate, wish: _Wish) -> None:
    try:
        check_engine(found, wish.verify)
    except BundleError as error:
        hint = _rebuild(bundle, wish.device, found.record.identity.options.precision)
        raise EngineError(f"the engine in {found.directory} is damaged: {error.message}", hint) from error


def _at_load(bundle: Bundle, target: Target, stale: tuple[Candidate, ...], options: EngineOptions) -> str:
    """What `describe` says of where it was compiled: at load, and why no engine of those that were built will do.

    Raises EngineError for targets that cannot do without one.
    """
    why = ""
    if stale:
        why = f"the engine in {stale[0].directory} is not for here: {'; '.join(stale[0].problems)}"
    elif damaged := unreadable(bundle, target.name):
        why = f"the engine in {damaged[0]} cannot be told: its engine.json is missing, damaged or of a newer version"
    precision = stale[0].record.identity.options.precision if stale else options.precision
    if target.needs_engine:
        message = why or f"no engine of {bundle.path} was built for {target.name} here ({options.precision})"
        raise EngineError(message, _rebuild(bundle, target.name, precision))
    if not why:
        return "at load"
    _log.warning("%s; compiled again at load. %s", why, _rebuild(bundle, target.name, precision))
    return f"at load, because {why}"


def _rebuild(bundle: Bundle, target: str, precision: str) -> str:
    asked = "" if precision == "fp32" else f" --precision {precision}"
    return f"rebuild it: perceiver-export build {bundle.path} --target {target}{asked}"


def check_threads(threads: int | None) -> None:
    """Raise UsageError for a number of threads that makes no sense."""
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise UsageError(f"threads is {threads}", f"give 1 to {_MOST_THREADS}, or leave it out")


def _check_arithmetic(bundle: Bundle) -> None:
    """Refuse 8-bit weights where sums of int8 products saturate. Raises DeviceError."""
    quantized = bundle.manifest.quantization
    if quantized is None or not quantized.int8_activations or quantized.weight_bits < 8:
        return
    from perceiver_export.runtimes.machine import saturates

    if saturates():
        raise DeviceError(
            "this CPU has no VNNI: it adds int8 products in 16 bits, and weights of 8 bits overflow them",
            "quantize again with --weight-bits 7",
        )


def _signature(spec: TensorSpec) -> tuple[str, str, tuple[int | None, ...]]:
    """Name, dtype and fixed dimensions: what a manifest and a graph must agree on."""
    return spec.name, spec.dtype, tuple(dim if isinstance(dim, int) else None for dim in spec.shape)
