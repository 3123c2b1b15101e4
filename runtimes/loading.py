# SPDX-License-Identifier: Apache-2.0
"""Load a bundle or a plain ONNX file as a `Runtime` on a target. Heavy imports wait until the first call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from perceiver_export.runtimes.errors import check_kind

if TYPE_CHECKING:
    from perceiver_export.runtimes.bundle import BundleLike, Verify
    from perceiver_export.runtimes.engines.backend import Hint, PrecisionChoice
    from perceiver_export.runtimes.runtime import Runtime


def load(
    bundle: BundleLike,
    device: str = "auto",
    part: str | None = None,
    threads: int | None = None,
    verify: Verify = "auto",
    *,
    precision: PrecisionChoice | None = None,
    hint: Hint = "latency",
    check_finite: bool = False,
) -> Runtime:
    """Load a bundle for running.

    ``part`` names one part of a split bundle; None joins all parts behind one `run`, which decodes every query.
    ``device`` is a target or ``auto`` (see `choose_target`). A named device is never replaced by another. ``threads``
    None lets the engine choose. ``precision`` None uses the engine that was built last, in any precision, or fp32 if
    none was built; ``auto`` uses the fastest that is certified here (see `choose_precision`). ``hint`` is the goal of
    compilation: ``latency`` or ``throughput``. With ``check_finite``, NaN or infinity in inputs or outputs is an error.

    An engine from `build` is used if it matches this machine, library and model. If not, targets that compile in
    seconds compile again, with a warning, and `Runtime.describe` reports it; on other targets it is an error.

    Raises BundleError, DeviceError, EngineError, MissingDependencyError, UsageError.
    """
    from perceiver_export.runtimes.opening import open_parts

    return open_parts(bundle, device, part, threads, verify, precision, hint, check_finite)


def load_onnx(path: str | os.PathLike[str], device: str = "auto", threads: int | None = None) -> Runtime:
    """Load a plain ONNX file for comparison. Its own description of inputs and outputs is trusted.

    Raises BundleError, DeviceError, EngineError, MissingDependencyError, UsageError.
    """
    from perceiver_export.runtimes.opening import open_engine
    from perceiver_export.runtimes.runtime import Runtime

    check_kind("a graph", path, (str, os.PathLike), "the path of an ONNX file")
    engine = open_engine(Path(path), "ort-cpu" if device == "auto" else device, threads)
    return Runtime(engine, engine.inputs, engine.outputs, "unknown")
