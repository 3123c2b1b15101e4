# SPDX-License-Identifier: Apache-2.0
"""What the manifest says of pre- and post-processing: one struct a kind of data, read by the tasks."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from perceiver_export.runtimes.errors import BundleError


class ImagePreprocessing(msgspec.Struct, frozen=True, tag="image", forbid_unknown_fields=True):
    """How a picture becomes the input: centre crop, resize, scale, normalise, in this order.

    ``crop_fraction`` is the (vertical, horizontal) share of the shorter side that is kept; None keeps the whole
    picture. ``resample`` is Pillow's filter of that name, with antialiasing, or ``opencv-bicubic``: OpenCV's
    ``INTER_CUBIC``, without, as DeepMind's code uses it. Then (pixel · scale − mean) / std.
    """

    height: int
    width: int
    crop_fraction: tuple[float, float] | None
    resample: Literal["bilinear", "bicubic", "lanczos", "opencv-bicubic"]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class TextPreprocessing(msgspec.Struct, frozen=True, tag="text", forbid_unknown_fields=True):
    """UTF-8 bytes + 6, padded with 0 to ``length``; with ``special_tokens`` between [CLS] and [SEP] (transformers)."""

    length: int
    special_tokens: bool


class FlowPreprocessing(msgspec.Struct, frozen=True, tag="flow", forbid_unknown_fields=True):
    """Frame pairs, scaled to [-1, 1], cut into tiles of height × width that overlap by ``min_overlap`` or more."""

    height: int
    width: int
    min_overlap: int

    @classmethod
    def of_tile(cls, height: int, width: int) -> FlowPreprocessing:
        """DeepMind's overlap, 20 pixels, or a quarter of the shorter side where tiles are small."""
        return cls(height, width, min(20, min(height, width) // 4))


class VideoPreprocessing(msgspec.Struct, frozen=True, tag="video", forbid_unknown_fields=True):
    """Frames, square-cropped, resized, in [0, 1]; ``num_samples`` of mono audio in [-1, 1] at ``sample_rate``."""

    num_frames: int
    height: int
    width: int
    num_samples: int
    sample_rate: int


class AudioPreprocessing(msgspec.Struct, frozen=True, tag="audio", forbid_unknown_fields=True):
    """Mono audio in [-1, 1] (0 samples: none is read), and frames in [0, 1] where the model sees them too (else 0).

    With ``mel`` (frames, bins) the audio is given as a log-mel spectrogram of that shape.
    """

    num_samples: int
    sample_rate: int
    num_frames: int = 0
    height: int = 0
    width: int = 0
    mel: tuple[int, int] | None = None


class PointsPreprocessing(msgspec.Struct, frozen=True, tag="points", forbid_unknown_fields=True):
    """Up to ``num_points`` points (x, y, z), moved to mean 0 and scaled into the cube [-1, 1]."""

    num_points: int


Preprocessing = (
    ImagePreprocessing
    | TextPreprocessing
    | FlowPreprocessing
    | VideoPreprocessing
    | AudioPreprocessing
    | PointsPreprocessing
)


def check_preprocessing(steps: Preprocessing) -> None:
    """Raise BundleError where a value cannot be used."""
    if found := unusable(steps):
        raise BundleError(f"the manifest's preprocessing cannot be used: {found}", "export the bundle again")


def unusable(steps: Preprocessing) -> str:
    """The first value that cannot be used, and what it should be; empty where all can."""
    for name in steps.__struct_fields__:
        value = getattr(steps, name)
        if isinstance(value, int) and not 0 <= value < 1 << 31:
            return f"{name} is {value}"
    return _unusable_picture(steps) if isinstance(steps, ImagePreprocessing) else ""


def _unusable_picture(steps: ImagePreprocessing) -> str:
    if min(steps.height, steps.width) < 1:
        return f"pictures of {steps.height} × {steps.width}"
    if not (math.isfinite(steps.scale) and steps.scale > 0):
        return f"scale is {steps.scale}, not above 0"
    for name, values in (("mean", steps.mean), ("std", steps.std)):
        if len(values) != 3 or not all(map(math.isfinite, values)):
            return f"{name} is {list(values)}, not a number for each of three channels"
    if min(steps.std) <= 0:
        return f"std is {list(steps.std)}, not above 0"
    if steps.crop_fraction is not None and not all(0 < share <= 1 for share in steps.crop_fraction):
        return f"crop_fraction is {list(steps.crop_fraction)}, not above 0 and up to 1"
    return ""
