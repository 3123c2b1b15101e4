# SPDX-License-Identifier: Apache-2.0
"""Compiling a bundle's graphs for a target, ahead of the first load: with the target's library, not torch, not onnx."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.engines.backend import Backend, EngineOptions, Hint, Precision, Progress, Source
from perceiver_export.runtimes.engines.cache import builders_lock, candidates, check_engine, publish, writable_root
from perceiver_export.runtimes.engines.records import RECORD, Identity, identify, make_source, read_record
from perceiver_export.runtimes.engines.targets import find_target
from perceiver_export.runtimes.errors import BundleError, UsageError, check_choice


@dataclass(frozen=True)
class BuiltEngine:
    """One part's engine. ``seconds`` is what compiling took; ``new`` is False where it was there already."""

    target: str
    part: str
    directory: Path
    seconds: float
    new: bool


def build(
    bundle: str | os.PathLike[str] | Bundle,
    target: str,
    *,
    precision: Precision = "fp32",
    hint: Hint = "latency",
    shapes: Mapping[str, tuple[int, int, int]] | None = None,
    flags: Mapping[str, str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[BuiltEngine, ...]:
    """Compile every part of a bundle for a target, on the device that will run it, unless a valid engine is there.

    ``shapes`` gives a named dimension's least, best and largest size where the target wants to know the best;
    ``flags`` are the backend's own. Engines go into the bundle, or into the user's cache directory where the bundle
    cannot be written. Two processes may build at once: one works, the other waits and takes what it made.

    Raises BuildError, BundleError, DeviceError, MissingDependencyError; UsageError: a dimension that the bundle does
    not have, or sizes outside its range.
    """
    check_choice("precision", precision, get_args(Precision))
    check_choice("hint", hint, get_args(Hint))
    opened = open_bundle(bundle)
    _check_shapes(opened, shapes or {})
    backend = find_target(target).backend()
    options = EngineOptions(precision=precision, hint=hint, shapes=dict(shapes or {}), flags=dict(flags or {}))
    platform = backend.platform(target, options)
    report = progress or (lambda what, done, total: None)
    built = []
    for name, part in opened.manifest.parts.items():
        source = make_source(opened, part, target, options)
        identity = identify(opened, name, source, platform)
        built.append(_build_part(opened, identity, source, backend, force, report))
    return tuple(built)


def _check_shapes(bundle: Bundle, shapes: Mapping[str, tuple[int, int, int]]) -> None:
    specs = [spec for part in bundle.manifest.parts.values() for spec in part.inputs]
    ranges = {name: limits for spec in specs for name, limits in spec.ranges.items()}
    for name, sizes in shapes.items():
        if name not in ranges:
            raise UsageError(
                f"the bundle has no dimension {name!r}",
                f"it has {', '.join(ranges)}"
                if ranges
                else "its shapes are fixed: export it with --batch LEAST:BEST:MOST",
            )
        least, most = ranges[name]
        if not least <= sizes[0] <= sizes[1] <= sizes[2] <= most:
            raise UsageError(f"{name} goes from {least} to {most} in the bundle, not as {sizes}", "give sizes within")


def _build_part(
    bundle: Bundle, identity: Identity, source: Source, backend: Backend, force: bool, progress: Progress
) -> BuiltEngine:
    found = None if force else _valid(bundle, identity, backend)
    if found is not None:
        return found
    root = writable_root(bundle)
    what = f"{identity.part} for {identity.target}"
    with builders_lock(root, identity.target, lambda: progress(f"another process builds {what}, waiting", 0, None)):
        found = None if force else _valid(bundle, identity, backend)  # the one that we waited for made it
        if found is not None:
            return found

        def write(directory: Path) -> float:
            start = time.perf_counter()
            backend.compile(source, directory, progress)
            return time.perf_counter() - start

        directory = publish(root, identity, write)
    record = read_record(directory)
    return BuiltEngine(identity.target, identity.part, directory, record.seconds if record else 0.0, new=True)


def _valid(bundle: Bundle, identity: Identity, backend: Backend) -> BuiltEngine | None:
    """An engine that need not be built again: of this very identity, and whole."""
    for candidate in candidates(bundle, identity, backend):
        if candidate.record.identity.options == identity.options and not candidate.problems:
            try:
                check_engine(candidate, "auto")
            except BundleError:
                continue
            with contextlib.suppress(OSError):  # `load` takes the one that was asked for last
                os.utime(candidate.directory / RECORD)
            return BuiltEngine(identity.target, identity.part, candidate.directory, candidate.record.seconds, new=False)
    return None
