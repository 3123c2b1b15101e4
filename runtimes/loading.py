# SPDX-License-Identifier: Apache-2.0
"""From a bundle or a plain ONNX file to a `Runtime` on a target. Importing this costs nothing until it is called."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perceiver_export.runtimes.bundle import Bundle, Verify
    from perceiver_export.runtimes.engines.backend import Hint, PrecisionChoice
    from perceiver_export.runtimes.runtime import Runtime


def load(
    bundle: str | os.PathLike[str] | Bundle,
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

    ``part`` is one part of a split bundle; None joins all parts behind one `run`, which decodes every query.
    ``device`` is a target or ``auto`` (see `choose_target`). A named device is used or refused, never replaced.
    ``threads`` None lets the engine choose. ``precision`` None takes the engine that was built last, in any precision,
    and fp32 if none was built; ``auto`` takes the fastest that is certified here (see `choose_precision`). ``hint`` is
    what to compile for: ``latency`` or ``throughput``. ``check_finite`` refuses NaN and infinity in inputs and outputs.

    An engine that `build` made is used if it fits this machine, library and model. If it does not, targets that compile
    in seconds compile again (with a warning, and `Runtime.describe` says so); the others refuse.

    Raises BundleError, DeviceError, EngineError, MissingDependencyError, UsageError.
    """
    from perceiver_export.runtimes.opening import open_parts

    return open_parts(bundle, device, part, threads, verify, precision, hint, check_finite)


def load_onnx(path: str | os.PathLike[str], device: str = "auto", threads: int | None = None) -> Runtime:
    """Load a plain ONNX file, to compare with it. Its own description of inputs and outputs is trusted.

    Raises BundleError, DeviceError, EngineError, MissingDependencyError, UsageError.
    """
    from perceiver_export.runtimes.opening import open_graph

    return open_graph(path, device, threads)
