# SPDX-License-Identifier: Apache-2.0
"""One bundle on several targets, each held against the same reference on the same samples."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from perceiver_export.calibration.directories import new_directory
from perceiver_export.calibration.validated import Validation
from perceiver_export.calibration.validation import validate
from perceiver_export.calibration.worst_files import OPTION
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import DataError, DeviceError
from perceiver_export.runtimes.presence import devices


def validate_targets(
    bundle: str | os.PathLike[str] | Bundle,
    data: str | Path,
    targets: str = "all",
    save_worst: str | Path | None = None,
    **options: Any,
) -> tuple[Validation, ...]:
    """`validate` on a target, or on ``all`` that are present; ``options`` are its other arguments.

    Of ``all``, ``save_worst`` gets a folder a target. Raises what `validate` raises; DeviceError where no target is
    present.
    """
    if targets != "all":
        return (validate(bundle, data, device=targets, save_worst=save_worst, **options),)
    present = [device.target for device in devices()]
    if not present:
        raise DeviceError("no target is present", "perceiver-export doctor says what is missing")
    against = options.get("against")
    on_a_target = against is not None and not callable(against)
    reference = options.pop("against_device", None) or (present[0] if on_a_target else None)
    with contextlib.ExitStack() as stack:
        folder = None if save_worst is None else stack.enter_context(new_directory(Path(save_worst), OPTION, DataError))
        return tuple(
            validate(
                bundle,
                data,
                device=target,
                against_device=reference,
                save_worst=None if folder is None else folder / target,
                **options,
            )
            for target in present
        )
