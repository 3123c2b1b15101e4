# SPDX-License-Identifier: Apache-2.0
"""The manifest's description of preprocessing, with one struct per kind of data. Tasks read it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from perceiver_export.runtimes.files import decoder

MAX_SIDE = 16_384  # pixels; a larger image is a mistake and would need terabytes
Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
Share = Annotated[float, msgspec.Meta(gt=0, le=MAX_SIDE)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
# Pillow's filters, which antialias when they shrink, and OpenCV's INTER_CUBIC, which does not; DeepMind's code uses it.
Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos", "opencv-bicubic"]


class Resize(msgspec.Struct, frozen=True, tag="resize", forbid_unknown_fields=True):
    """Resize to height × width pixels, whatever the image's proportions."""

    height: Side
    width: Side
    resample: Filter


class ResizeEdge(msgspec.Struct, frozen=True, tag="resize-edge", forbid_unknown_fields=True):
    """Resize the shorter side to ``shortest`` pixels and the longer in proportion, to at most ``longest`` (0: any)."""

    shortest: Side
    longest: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIDE)]
    resample: Filter


class ResizeInto(msgspec.Struct, frozen=True, tag="resize-into", forbid_unknown_fields=True):
    """Resize in proportion to the largest size that fits into height × width."""

    height: Side
    width: Side
    resample: Filter


class CenterCrop(msgspec.Struct, frozen=True, tag="center-crop", forbid_unknown_fields=True):
    """Crop to the middle height × width pixels; a smaller image is padded with zeros."""

    height: Side
    width: Side


class CenterCropShare(msgspec.Struct, frozen=True, tag="center-crop-share", forbid_unknown_fields=True):
    """Crop the middle to ``vertical`` and ``horizontal`` shares of the shorter side; shares above 1 pad with zeros.

    If an odd number of pixels is cut off, transformers' Perceiver starts half a pixel above and to the left of the
    exact position, DeepMind's code (``round_up``) below and to the right of it.
    """

    vertical: Share
    horizontal: Share
    round_up: bool = False


class Rescale(msgspec.Struct, frozen=True, tag="rescale", forbid_unknown_fields=True):
    """pixel · factor + offset."""

    factor: Positive
    offset: float = 0.0


class Normalize(msgspec.Struct, frozen=True, tag="normalize", forbid_unknown_fields=True):
    """(value − mean) / std, for each of the three channels."""

    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class ReverseChannels(msgspec.Struct, frozen=True, tag="reverse-channels", forbid_unknown_fields=True):
    """RGB to BGR."""


ImageStep = Resize | ResizeEdge | ResizeInto | CenterCrop | CenterCropShare | Rescale | Normalize | ReverseChannels


class ImagePreprocessing(msgspec.Struct, frozen=True, tag="image", forbid_unknown_fields=True):
    """The steps, in order, that turn an RGB image into the input of 3 × height × width."""

    height: Side
    width: Side
    steps: tuple[ImageStep, ...]


class TokenizerFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tokenizer.json in the bundle, for the `tokenizers` library.

    ``mask`` is the text of a masked token, empty if the tokenizer has none; ``pad`` is the padding token. With
    ``clean_up``, spaces before punctuation are removed from decoded text, as in transformers.
    """

    file: str
    mask: str = ""
    pad: Count = 0
    clean_up: bool = False


class TextPreprocessing(msgspec.Struct, frozen=True, tag="text", forbid_unknown_fields=True):
    """Text as tokens, padded to ``length``.

    Tokens are UTF-8 bytes + 6, with ``special_tokens`` between [CLS] and [SEP] (transformers' PerceiverTokenizer), or
    come from ``tokenizer``. A text of more than ``length`` tokens is an error, or with ``truncate`` is cut on
    ``truncation_side`` to ``max_tokens`` (0: to ``length``), including special tokens.
    """

    length: Count
    special_tokens: bool
    tokenizer: TokenizerFile | None = None
    truncate: bool = False
    max_tokens: Count = 0
    truncation_side: Literal["left", "right"] = "right"

    @property
    def cut(self) -> int | None:
        """The number of tokens to which a longer text is cut; None if a longer text is an error."""
        return min(self.max_tokens or self.length, self.length) if self.truncate else None


class FlowPreprocessing(msgspec.Struct, frozen=True, tag="flow", forbid_unknown_fields=True):
    """Frame pairs, scaled to [-1, 1] and cut into tiles of height × width that overlap by at least ``min_overlap``."""

    height: Count
    width: Count
    min_overlap: Count

    @classmethod
    def of_tile(cls, height: int, width: int) -> FlowPreprocessing:
        """Use DeepMind's overlap of 20 pixels, or a quarter of the shorter side if that is smaller."""
        return cls(height, width, min(20, min(height, width) // 4))


class VideoPreprocessing(msgspec.Struct, frozen=True, tag="video", forbid_unknown_fields=True):
    """Square-cropped, resized frames in [0, 1], and ``num_samples`` of mono audio in [-1, 1] at ``sample_rate`` Hz.

    ``sample_rate`` is None if the checkpoint does not state it. Sound of any rate is then used unchanged.
    """

    num_frames: Count
    height: Count
    width: Count
    num_samples: Count
    sample_rate: Count | None = None


class AudioPreprocessing(msgspec.Struct, frozen=True, tag="audio", forbid_unknown_fields=True):
    """Mono audio in [-1, 1] (``num_samples`` 0: no audio) and frames in [0, 1] (``num_frames`` 0: no frames).

    With ``mel`` the model takes the audio as a log-mel spectrogram of that shape (frames, bins).
    """

    num_samples: Count
    sample_rate: Count
    num_frames: Count = 0
    height: Count = 0
    width: Count = 0
    mel: tuple[Count, Count] | None = None


class PointsPreprocessing(msgspec.Struct, frozen=True, tag="points", forbid_unknown_fields=True):
    """Up to ``num_points`` points (x, y, z), moved to mean 0 and scaled into the cube [-1, 1]."""

    num_points: Count


Preprocessing = (
    ImagePreprocessing
    | TextPreprocessing
    | FlowPreprocessing
    | VideoPreprocessing
    | AudioPreprocessing
    | PointsPreprocessing
)


def unusable(steps: Preprocessing) -> str:
    """The first invalid value and the limits of its field; empty if all values are valid."""
    try:  # through JSON, which has neither NaN nor infinity
        decoder(Preprocessing).decode(msgspec.json.encode(steps))
    except (msgspec.ValidationError, OverflowError, TypeError) as error:
        return str(error)
    scaled = False
    for step in steps.steps if isinstance(steps, ImagePreprocessing) else ():
        if scaled and isinstance(step, (Resize, ResizeEdge, ResizeInto)):
            return "it resizes after scaling the values"
        scaled = scaled or isinstance(step, (Rescale, Normalize))
    return ""
