# SPDX-License-Identifier: Apache-2.0
"""Video autoencoders: PSNR and SSIM of the frames against what went in, of sound its SNR; and likeness of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from perceiver_export.calibration.metrics.base import Column, Columns, Metric, kl, sqnr
from perceiver_export.runtimes.errors import MissingDependencyError
from perceiver_export.runtimes.runtime import Array

METRICS = (
    Metric("psnr", "quality", "higher", "mean", "dB"),
    Metric("ssim", "quality", "higher", "mean"),
    Metric("sound snr", "quality", "higher", "mean", "dB"),
    Metric("sqnr", "likeness", "higher", "mean", "dB"),
    Metric("agreement", "likeness", "higher", "share", "%"),
    Metric("kl", "likeness", "lower", "mean", "nats"),
)
TARGETS: tuple[str, ...] = ("frames",)

_MOST = 100.0  # dB, which stands for equal


def quality(outputs: Mapping[str, Array], targets: Mapping[str, Array]) -> Columns:
    """``targets``: what went in, ``frames`` (n, T, H, W, 3) in [0, 1] and ``audio`` (n, samples, 1)."""
    frames, found = targets["frames"].astype(np.float64), outputs["video"].astype(np.float64)
    error = np.square(found - frames).reshape(len(frames), -1).mean(axis=1)
    columns = {
        "psnr": Column.of(np.minimum(-10 * np.log10(np.maximum(error, 1e-12)), _MOST)),
        "ssim": Column.of(np.array([_ssim(*pair) for pair in zip(frames, found, strict=True)])),
    }
    if "audio" in targets and "sound" in outputs:
        sound = targets["audio"].reshape(len(frames), -1)
        columns["sound snr"] = Column.of(np.minimum(sqnr(sound, outputs["sound"].reshape(sound.shape)), _MOST))
    return columns


def likeness(outputs: Mapping[str, Array], reference: Mapping[str, Array], targets: Mapping[str, Array]) -> Columns:
    """Signal to noise of the frames; where the model also classifies, agreement and KL of that."""
    columns = {"sqnr": Column.of(sqnr(reference["video"], outputs["video"]))}
    if "label" in outputs:
        found, expected = (side["label"].reshape(len(side["label"]), -1) for side in (outputs, reference))
        columns["agreement"] = Column.of(found.argmax(axis=1) == expected.argmax(axis=1))
        columns["kl"] = Column.of(kl(expected, found))
    return columns


def _ssim(expected: Array, found: Array) -> float:
    """Mean structural similarity of the frames (T, H, W, 3) with values in [0, 1] (Wang et al. 2004)."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise MissingDependencyError("SSIM needs scikit-image", "pip install 'perceiver-export[validate]'") from error
    size = min(7, *(side - 1 + side % 2 for side in expected.shape[1:3]))  # odd, and no larger than a frame
    similarity: Callable[..., float] = structural_similarity
    pairs = zip(expected, found, strict=True)
    return float(np.mean([similarity(*pair, win_size=size, channel_axis=-1, data_range=1.0) for pair in pairs]))
