# SPDX-License-Identifier: Apache-2.0
"""One bundle on several targets, each held against the same reference on the same samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from perceiver_export.calibration.validation import Validation, validate
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import DeviceError
from perceiver_export.runtimes.presence import devices


def validate_targets(
    bundle: str | os.PathLike[str] | Bundle, data: str | Path, targets: str = "all", **options: Any
) -> tuple[Validation, ...]:
    """`validate` on a target, or on ``all`` that are present; ``options`` are its other arguments.

    Raises what `validate` raises; DeviceError where no target is present.
    """
    if targets != "all":
        return (validate(bundle, data, device=targets, **options),)
    present = [device.target for device in devices()]
    if not present:
        raise DeviceError("no target is present", "perceiver-export doctor says what is missing")
    reference = options.pop("against_device", None) or (present[0] if options.get("against") is not None else None)
    return tuple(validate(bundle, data, device=target, against_device=reference, **options) for target in present)
