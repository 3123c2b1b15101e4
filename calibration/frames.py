# SPDX-License-Identifier: Apache-2.0
"""Frames of optical flow among DATA's arrays, read alike by `quantize` and `validate`: prepared, or pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.preprocessing import FlowPreprocessing


def with_frames(values: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """A sample's ``values``; ``frames`` of uint8 (2, H, W, 3) as the model takes them: float32 (2, 3, H, W), −1 to 1.

    An axis of 1 in front is a batch. Any other shape stays, and is refused where all are.
    """
    frames = values.get("frames")
    if not isinstance(manifest.preprocessing, FlowPreprocessing) or not isinstance(frames, np.ndarray):
        return dict(values)
    if frames.ndim == 5 and len(frames) == 1:
        frames = frames[0]
    if frames.dtype != np.uint8 or frames.ndim != 4:
        return dict(values)
    scaled = (frames / 255.0 * 2.0 - 1.0).astype(np.float32)
    return {**values, "frames": np.moveaxis(scaled, -1, 1)}
