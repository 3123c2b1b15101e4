# SPDX-License-Identifier: Apache-2.0
"""Choose or compile the engine of each part of a bundle, and open it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

import msgspec

from perceiver_export.runtimes import exits
from perceiver_export.runtimes.bundle import Bundle, BundleLike, Verify, open_bundle
from perceiver_export.runtimes.engines import cache
from perceiver_export.runtimes.engines.backend import (
    Engine,
    EngineOptions,
    Hint,
    Precision,
    PrecisionChoice,
    Source,
    Target,
    find_target,
)
from perceiver_export.runtimes.engines.flags import flag_problem
from perceiver_export.runtimes.errors import (
    BundleError,
    DeviceError,
    EngineError,
    PerceiverExportError,
    UsageError,
    check_choice,
    check_whole,
)
from perceiver_export.runtimes.manifest import MemoryPlan, TensorSpec, misfit
from perceiver_export.runtimes.runtime import Runtime

_log = logging.getLogger(__name__)

_PLAIN = EngineOptions()
_MOST_THREADS = 1024  # onnxruntime accepts any number; starting thousands takes minutes


@exits.awaited
def open_parts(
    bundle: BundleLike,
    device: str,
    part: str | None,
    threads: int | None,
    verify: Verify,
    precision: PrecisionChoice | None,
    hint: Hint,
    check_finite: bool,
) -> Runtime:
    """See `load`."""
    exits.enter()
    check_threads(threads)
    check_choice("hint", hint, get_args(Hint))
    if precision is not None:
        check_choice("precision", precision, get_args(PrecisionChoice))
    if precision == "auto" and hint != "latency":
        raise UsageError(f"precision auto compares engines for latency, but hint is {hint!r}", "name the precision")
    opened = open_bundle(bundle, verify)
    _check_arithmetic(opened)
    _log.debug("%s: verified %s, task %s", opened.path, verify, opened.manifest.task)
    if device == "auto":
        from perceiver_export.runtimes.presence import choose_target

        device = choose_target(opened, precision, threads)
    if precision == "auto":
        from perceiver_export.runtimes.presence import choose_precision

        precision = choose_precision(opened, device, threads)
    loader = _Loader(opened, device, threads, verify, precision, hint, check_finite)
    try:
        if part is not None or not opened.split:
            return loader.load(part)
        from perceiver_export.runtimes.split import join

        return join(opened, {name: loader.load(name) for name in opened.manifest.parts})
    except PerceiverExportError as error:
        _log.info("%s cannot run on %s, and no other target is used instead: %s", opened.path, device, error.message)
        raise


@exits.awaited
def open_engine(
    path: Path,
    device: str,
    threads: int | None,
    options: EngineOptions = _PLAIN,
    inputs: tuple[TensorSpec, ...] = (),
    plan: MemoryPlan | None = None,
) -> Engine:
    """Compile a graph for a target. ``inputs`` gives the names to use if the engine keeps several names of an input;
    ``plan`` says how much memory the graph needs.

    Raises DeviceError, EngineError, MissingDependencyError, UsageError.
    """
    exits.enter()
    check_threads(threads)
    target = find_target(device)
    if target.needs_engine:
        raise EngineError(
            f"{device} needs a built engine, and a plain ONNX file has none",
            "make a bundle of it with `perceiver-export export`, then run `perceiver-export build`",
        )
    backend = target.backend()
    backend.platform(device, options)
    return backend.open(Source(device, path, options, "unknown", inputs, plan=plan), None, threads)


def engine_for(
    bundle: Bundle, name: str, target: str, options: EngineOptions, precision: Precision | None
) -> tuple[Source, cache.Candidate | None, tuple[cache.Candidate, ...]]:
    """The engine that `load` uses for the part ``name``. No engine is deserialized.

    Returns the part's graph with the options of that engine; the engine, or None if none can be used here; and if None,
    the unusable engines of this target, hint and ``precision`` (None: any), newest first: `load` compiles with the
    first one's options. Raises BundleError, DeviceError, MissingDependencyError.
    """
    backend = find_target(target).backend()
    source = cache.make_source(bundle, bundle.manifest.parts[name], target, options)
    here = cache.identify(bundle, name, source, backend.platform(target, options))
    stale = []
    for candidate in cache.candidates(bundle, here, backend):
        asked = candidate.record.identity.options
        if asked.hint == options.hint and precision in (None, asked.precision):
            if not candidate.problems:
                return msgspec.structs.replace(source, options=asked), candidate, ()
            stale.append(candidate)
    if stale:
        asked = stale[0].record.identity.options
        # Only this user's engines may choose settings of the library.
        wrong = any(flag_problem(*flag, backend.flags(target)) for flag in asked.flags.items())
        if wrong or not stale[0].trusted:
            asked = msgspec.structs.replace(asked, flags={})
        source = msgspec.structs.replace(source, options=asked)
    return source, None, tuple(stale)


class _Loader(msgspec.Struct, frozen=True):
    """The arguments of `load`, for each part."""

    bundle: Bundle
    device: str
    threads: int | None
    verify: Verify
    precision: Precision | None
    hint: Hint
    check_finite: bool

    def load(self, name: str | None) -> Runtime:
        """Load one part; None selects the only one."""
        bundle, part, target = self.bundle, self.bundle.part(name), find_target(self.device)
        key = next(key for key, value in bundle.manifest.parts.items() if value is part)
        options = EngineOptions(precision=self.precision or "fp32", hint=self.hint)
        source, found, stale = engine_for(bundle, key, target.name, options, self.precision)
        compiled = self._check_whole(found) if found else self._compile_again(target, stale)
        _log.debug("%s: %s on %s, compiled: %s", source.graph, source.options, target.name, compiled)
        engine = target.backend().open(source, found.directory if found else None, self.threads)
        for ours, theirs in ((part.inputs, engine.inputs), (part.outputs, engine.outputs)):
            if set(map(_signature, ours)) != set(map(_signature, theirs)):
                raise misfit(f"{source.graph.name} does not have the tensors of the manifest")
        runtime = Runtime(
            engine,
            part.inputs,
            part.outputs,
            bundle.manifest.precision,
            part.num_queries,
            compiled=compiled,
            check_finite=self.check_finite,
            certificates=certificates_of(bundle, engine),
        )
        _log.info("%s loaded: %s", source.graph, runtime.describe())
        return runtime

    def _check_whole(self, found: cache.Candidate) -> str:
        """The engine's directory. Raises EngineError: its files were changed.

        A library executes an engine, but only parses a graph, so "never" skips only the bundle's own files.
        """
        try:
            cache.check_engine(found, "auto" if self.verify == "never" else self.verify)
        except BundleError as error:
            hint = self._rebuild(found.record.identity.options.precision)
            raise EngineError(f"the engine in {found.directory} is damaged: {error.message}", hint) from error
        return str(found.directory)

    def _compile_again(self, target: Target, stale: tuple[cache.Candidate, ...]) -> str:
        """The text in `describe` that the graph is compiled at load and, if engines exist, why none can be used.

        Raises EngineError: the target never compiles at load.
        """
        precision, hint = self.precision or "fp32", ""
        why = cache.unreadable(self.bundle, target.name)
        if stale:
            precision = stale[0].record.identity.options.precision
            why = f"the engine in {stale[0].directory} cannot be used here: {'; '.join(stale[0].problems)}"
            hint = "" if stale[0].trusted else f"; or set {cache.ENVIRONMENT} to the key file that signed it"
        hint = self._rebuild(precision) + hint
        if target.needs_engine:
            missing = f"no engine of {self.bundle.path} was built for {target.name} here ({precision})"
            raise EngineError(why or missing, hint)
        if not why:
            return "at load"
        _log.warning("%s; compiled again at load. %s", why, hint)
        return f"at load, because {why}"

    def _rebuild(self, precision: str) -> str:
        asked = "" if precision == "fp32" else f" --precision {precision}"
        return f"rebuild it: perceiver-export build {self.bundle.path} --target {self.device}{asked}"


def certificates_of(bundle: Bundle, engine: Engine) -> tuple[str, ...]:
    """The certificates that hold for this engine on this machine."""
    if "calibration.json" not in bundle.manifest.files:
        return ()
    from perceiver_export.runtimes.certificates import applies, certificates, engine_of

    described = {"precision": bundle.manifest.precision, **engine.describe()}
    place = (bundle, str(described["target"]), engine_of(described))
    return tuple(str(one) for one in certificates(bundle) if applies(one, *place))


def check_threads(threads: int | None) -> None:
    """Raise UsageError unless ``threads`` is None or a sensible number."""
    if threads is not None:
        check_whole("threads", threads, 1, _MOST_THREADS, f"give 1 to {_MOST_THREADS}, or leave it out")


def _check_arithmetic(bundle: Bundle) -> None:
    """Raise DeviceError for 8-bit weights on a CPU whose int8 sums saturate."""
    quantized = bundle.manifest.quantization
    if quantized is None or not quantized.int8_activations or quantized.weight_bits < 8:
        return
    from perceiver_export.runtimes.machine import saturates

    if saturates():
        raise DeviceError(
            "this CPU has no VNNI: it adds int8 products in 16 bits, where products of 8-bit weights overflow",
            "quantize again with --weight-bits 7",
        )


def _signature(spec: TensorSpec) -> tuple[str, str, tuple[int | None, ...]]:
    """Name, dtype and fixed dimensions, which a manifest and a graph must agree on."""
    return spec.name, spec.dtype, tuple(dim if isinstance(dim, int) else None for dim in spec.shape)
