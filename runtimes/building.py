# SPDX-License-Identifier: Apache-2.0
"""Compile a bundle's graphs for a target before the first load, with the target's library but without torch or onnx."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec

from perceiver_export.runtimes import exits
from perceiver_export.runtimes.bundle import Bundle, BundleLike, open_bundle
from perceiver_export.runtimes.engines import cache
from perceiver_export.runtimes.engines.backend import (
    Backend,
    EngineOptions,
    Hint,
    Precision,
    PrecisionChoice,
    Progress,
    Source,
    find_target,
)
from perceiver_export.runtimes.engines.flags import check_flags
from perceiver_export.runtimes.errors import BundleError, UsageError, check_choice, check_kind
from perceiver_export.runtimes.presence import choose_precision


@dataclass(frozen=True)
class BuiltEngine:
    """One part's engine, built in ``precision``.

    ``seconds`` is the compile time; ``new`` is False if the engine already existed.
    """

    target: str
    part: str
    precision: Precision
    directory: Path
    seconds: float
    new: bool


@exits.awaited
def build(
    bundle: BundleLike,
    target: str,
    *,
    precision: PrecisionChoice = "fp32",
    hint: Hint = "latency",
    shapes: Mapping[str, tuple[int, int, int]] | None = None,
    flags: Mapping[str, str] | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> tuple[BuiltEngine, ...]:
    """Compile every part of a bundle for a target, on the device that will run it, unless a valid engine exists.

    ``precision="auto"`` uses `choose_precision` with the figures of `bench --precision auto --save`, so it takes no
    other hint, shapes or flags. ``shapes`` gives the smallest, best and largest size of a named dimension. ``flags``
    are settings of the target's library, from its backend's list. Engines are written into the bundle, or into the
    user's cache directory if the bundle is read-only. If two processes build at once, one compiles, and the other waits
    and uses the result.

    Raises BuildError, BundleError, DeviceError, MissingDependencyError; UsageError: an unknown dimension, sizes
    outside its range, a flag that the target does not accept, or ``auto`` with a hint, shapes or flags.
    """
    exits.enter()
    check_choice("precision", precision, get_args(PrecisionChoice))
    check_choice("hint", hint, get_args(Hint))
    check_kind("shapes", shapes or {}, Mapping, "{name: (least, best, most)}")
    check_kind("flags", flags or {}, Mapping, "{name: value}, both text")
    if precision == "auto":
        check_auto(hint, shapes or {}, flags or {})
    opened = open_bundle(bundle)
    _check_shapes(opened, shapes or {})
    backend = find_target(target).backend()
    check_flags(target, flags or {}, backend.flags(target))
    options = EngineOptions(hint=hint, shapes=dict(shapes or {}), flags=dict(flags or {}))
    chosen = choose_precision(opened, target, options=options) if precision == "auto" else precision
    options = msgspec.structs.replace(options, precision=chosen)
    platform = backend.platform(target, options)
    built = []
    for name, part in opened.manifest.parts.items():
        source = cache.make_source(opened, part, target, options)
        identity = cache.identify(opened, name, source, platform)
        found = None if force else _valid(opened, identity, backend)
        built.append(found or _build_part(opened, identity, source, backend, force, progress))
    return tuple(built)


def check_auto(hint: Hint, shapes: Mapping[str, object], flags: Mapping[str, str]) -> None:
    """Raise UsageError for engines unlike those that `bench --precision auto` measures."""
    if hint != "latency" or shapes or flags:
        asked = f"hint {hint!r}" if hint != "latency" else ", ".join([*shapes, *flags])
        raise UsageError(
            f"precision auto compares engines for latency without shapes or flags, but got {asked}",
            "name the precision",
        )


def _check_shapes(bundle: Bundle, shapes: Mapping[str, tuple[int, int, int]]) -> None:
    specs = [spec for part in bundle.manifest.parts.values() for spec in part.inputs]
    ranges = {name: limits for spec in specs for name, limits in spec.ranges.items()}
    for name, sizes in shapes.items():
        if name not in ranges:
            known = f"use one of {', '.join(ranges)}" if ranges else "export it with --batch LEAST:BEST:MOST"
            raise UsageError(f"the bundle has no dimension {name!r}", known)
        least, most = ranges[name]
        whole = isinstance(sizes, Sequence) and len(sizes) == 3 and all(isinstance(size, int) for size in sizes)
        if not whole or not least <= sizes[0] <= sizes[1] <= sizes[2] <= most:
            raise UsageError(f"{name} has the sizes {sizes}", f"give LEAST:BEST:MOST from {least} to {most}")


def _build_part(
    bundle: Bundle, identity: cache.Identity, source: Source, backend: Backend, force: bool, progress: Progress
) -> BuiltEngine:
    root = cache.writable_root(bundle)
    waiting = f"waiting for the process that builds {identity.part} for {identity.target}"
    with cache.builders_lock(root, identity.target, lambda: progress(waiting, 0, None)):
        if not force and (found := _valid(bundle, identity, backend)):  # the other process built it
            return found
        directory, seconds = cache.publish(root, identity, lambda place: backend.compile(source, place, progress))
    return BuiltEngine(identity.target, identity.part, identity.options.precision, directory, seconds, new=True)


def _valid(bundle: Bundle, identity: cache.Identity, backend: Backend) -> BuiltEngine | None:
    """A complete engine of this identity; None if there is none."""
    for candidate in cache.candidates(bundle, identity, backend):
        if candidate.record.identity.options == identity.options and not candidate.problems:
            with contextlib.suppress(BundleError):
                cache.check_engine(candidate, "auto")
                with contextlib.suppress(OSError):  # `load` uses the engine that was built or requested last
                    os.utime(candidate.directory / cache.RECORD, follow_symlinks=False)
                found = (identity.target, identity.part, identity.options.precision, candidate.directory)
                return BuiltEngine(*found, candidate.record.seconds, new=False)
    return None
