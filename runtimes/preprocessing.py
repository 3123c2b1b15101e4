# SPDX-License-Identifier: Apache-2.0
"""The manifest's description of pre- and post-processing: one struct for each kind of data, read by the tasks."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from perceiver_export.runtimes.errors import BundleError

MAX_SIDE = 16_384  # of an image; more is a mistake, and would need terabytes
Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
Share = Annotated[float, msgspec.Meta(gt=0, le=MAX_SIDE)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
# Pillow's filters, which smooth where they shrink, and OpenCV's INTER_CUBIC, which does not: DeepMind's code uses it.
Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos", "opencv-bicubic"]


class Resize(msgspec.Struct, frozen=True, tag="resize", forbid_unknown_fields=True):
    """To height × width pixels, whatever the image's proportions."""

    height: Side
    width: Side
    resample: Filter


class ResizeEdge(msgspec.Struct, frozen=True, tag="resize-edge", forbid_unknown_fields=True):
    """The shorter side to ``shortest`` pixels, the longer one in proportion, but not above ``longest`` (0: any)."""

    shortest: Side
    longest: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIDE)]
    resample: Filter


class ResizeInto(msgspec.Struct, frozen=True, tag="resize-into", forbid_unknown_fields=True):
    """As large as fits into height × width, in proportion."""

    height: Side
    width: Side
    resample: Filter


class CenterCrop(msgspec.Struct, frozen=True, tag="center-crop", forbid_unknown_fields=True):
    """The middle height × width pixels; a smaller image gets a border of zeros."""

    height: Side
    width: Side


class CenterCropShare(msgspec.Struct, frozen=True, tag="center-crop-share", forbid_unknown_fields=True):
    """The middle ``vertical`` × ``horizontal`` shares of the shorter side; above 1 the image gets a border of zeros.

    Where an odd number of pixels is left over, transformers' Perceiver begins half a pixel above and left of the
    middle, DeepMind's code (``round_up``) below and right of it.
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
    """How an RGB image becomes the input, 3 × height × width: the steps, in their order."""

    height: Side
    width: Side
    steps: tuple[ImageStep, ...]


class TokenizerFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tokenizer.json in the bundle, for the `tokenizers` library.

    ``mask`` is what stands in a text for a masked token, empty where the tokenizer has none; ``pad`` is the token
    behind a text. With ``clean_up`` decoded text loses the spaces before punctuation, as transformers does it.
    """

    file: str
    mask: str = ""
    pad: Count = 0
    clean_up: bool = False


class TextPreprocessing(msgspec.Struct, frozen=True, tag="text", forbid_unknown_fields=True):
    """Text as tokens, padded to ``length``.

    They are UTF-8 bytes + 6, with ``special_tokens`` between [CLS] and [SEP] (transformers' PerceiverTokenizer), or
    the ``tokenizer``'s tokens. A text of more than ``length`` tokens is refused, or with ``truncate`` cut on
    ``truncation_side`` to ``max_tokens`` (0: to ``length``), which count special tokens too.
    """

    length: Count
    special_tokens: bool
    tokenizer: TokenizerFile | None = None
    truncate: bool = False
    max_tokens: Count = 0
    truncation_side: Literal["left", "right"] = "right"

    @property
    def cut(self) -> int | None:
        """The number of tokens that a longer text is cut to; None if it is refused."""
        return min(self.max_tokens or self.length, self.length) if self.truncate else None


class FlowPreprocessing(msgspec.Struct, frozen=True, tag="flow", forbid_unknown_fields=True):
    """Frame pairs, scaled to [-1, 1], cut into tiles of height × width that overlap by ``min_overlap`` or more."""

    height: Count
    width: Count
    min_overlap: Count

    @classmethod
    def of_tile(cls, height: int, width: int) -> FlowPreprocessing:
        """DeepMind's overlap, 20 pixels, or a quarter of the shorter side where tiles are small."""
        return cls(height, width, min(20, min(height, width) // 4))


class VideoPreprocessing(msgspec.Struct, frozen=True, tag="video", forbid_unknown_fields=True):
    """Frames, square-cropped, resized, in [0, 1]; ``num_samples`` of mono audio in [-1, 1] at ``sample_rate`` Hz.

    None: the checkpoint does not say its rate. Sound of any rate is then taken unchanged.
    """

    num_frames: Count
    height: Count
    width: Count
    num_samples: Count
    sample_rate: Count | None = None


class AudioPreprocessing(msgspec.Struct, frozen=True, tag="audio", forbid_unknown_fields=True):
    """Mono audio in [-1, 1] (0 samples: none is read), and frames in [0, 1] where the model sees them too (else 0).

    With ``mel`` (frames, bins) the audio is given as a log-mel spectrogram of that shape.
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


def check_preprocessing(steps: Preprocessing) -> None:
    """Raise BundleError if a value cannot be used."""
    if found := unusable(steps):
        raise BundleError(f"the manifest's preprocessing cannot be used: {found}", "export the bundle again")


def unusable(steps: Preprocessing) -> str:
    """The first value that cannot be used, and the limits of its field; empty if there is none."""
    try:  # as JSON, which has neither NaN nor infinity
        msgspec.json.decode(msgspec.json.encode(steps), type=Preprocessing)
    except (msgspec.ValidationError, OverflowError, TypeError) as error:
        return str(error)
    scaled = False
    for step in steps.steps if isinstance(steps, ImagePreprocessing) else ():
        if scaled and isinstance(step, (Resize, ResizeEdge, ResizeInto)):
            return "a resize after the values are scaled"
        scaled = scaled or isinstance(step, (Rescale, Normalize))
    return ""
