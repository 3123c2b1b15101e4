# SPDX-License-Identifier: Apache-2.0
"""Sizes of a Haiku checkpoint: from the shapes of its parameters, and what no shape tells from the released models.

What no shape tells are numbers of heads and blocks, sizes of pictures, frames and sounds, highest frequencies.
A checkpoint that differs from the released one there comes with a JSON file that says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec.structs import replace

from perceiver_export.exporter.checkpoints import haiku_names
from perceiver_export.exporter.checkpoints.haiku_names import HaikuModel, Shapes
from perceiver_export.exporter.checkpoints.weights import decode_json, read_bytes
from perceiver_export.exporter.model import architectures
from perceiver_export.exporter.model.architectures import EncoderSizes, Parity, VideoSizes
from perceiver_export.exporter.model.config import (
    ArrayInput,
    FourierPositions,
    ImageInput,
    MaskedInput,
    OutputConfig,
    PerceiverConfig,
    PositionQueries,
    QueryDecoder,
    TokenInput,
)
from perceiver_export.runtimes.errors import CheckpointError
from perceiver_export.runtimes.preprocessing import MAX_SIDE

_RGB = 3
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
_Resolution = Annotated[float, msgspec.Meta(gt=0, le=1 << 24)]


class LanguageFlags(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What no shape tells of the language model; defaults are the released model's, as in all of these."""

    num_blocks: _Count = 1
    num_cross_attention_heads: _Count = 8
    num_self_attention_heads: _Count = 8
    num_decoder_heads: _Count = 8


class ImageFlags(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the three picture models. ``image_size`` (height, width) is what the model was trained on: by default 224 ×
    224, or the square that learned positions make.
    """

    num_blocks: _Count = 8
    num_cross_attention_heads: _Count = 1
    num_self_attention_heads: _Count = 8
    num_decoder_heads: _Count = 1
    image_size: tuple[_Side, _Side] | None = None


class FourierImageFlags(ImageFlags, frozen=True):
    """``max_resolution`` is that of the Fourier positions: by default ``image_size``, or a quarter of it behind the
    convolution.
    """

    max_resolution: tuple[_Resolution, _Resolution] | None = None


class FlowFlags(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of optical flow. ``train_size`` (height, width) is that of a tile; neighbours share ``min_overlap`` pixels or
    more: by default 20, or a quarter of a tile that is lower than 80.
    """

    num_blocks: _Count = 1
    num_cross_attention_heads: _Count = 1
    num_self_attention_heads: _Count = 16
    num_decoder_heads: _Count = 1
    train_size: tuple[_Side, _Side] = (368, 496)
    min_overlap: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIDE)] | None = None


class VideoFlags(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the video autoencoder. The resolutions are those of the Fourier positions, by default the grid of patches and
    the number of samples. ``spatial_patch`` is the side of a patch of a frame; it follows from the shapes where the
    encoder has as many bands as the decoder.
    """

    num_blocks: _Count = 1
    num_cross_attention_heads: _Count = 1
    num_self_attention_heads: _Count = 8
    num_decoder_heads: _Count = 1
    num_frames: _Side = 16
    image_size: tuple[_Side, _Side] = (224, 224)
    num_samples: _Count = 30_720
    sample_rate: _Count = 48_000
    spatial_patch: _Side | None = None
    image_resolution: tuple[_Resolution, _Resolution, _Resolution] | None = None
    audio_resolution: _Resolution | None = None


Flags = LanguageFlags | ImageFlags | FlowFlags | VideoFlags
_FLAGS: dict[HaikuModel, type[Flags]] = {
    "language": LanguageFlags,
    "imagenet-learned": ImageFlags,
    "imagenet-fourier": FourierImageFlags,
    "imagenet-conv": FourierImageFlags,
    "optical-flow": FlowFlags,
    "video-autoencoding": VideoFlags,
}


def read_flags(model: HaikuModel, path: Path | None) -> Flags:
    """The released model's flags, with those that the JSON file changes. Raises CheckpointError."""
    kind = _FLAGS[model]
    if path is None:
        return kind()
    flags = decode_json(read_bytes(path, "a JSON file of sizes"), kind, str(path))
    if isinstance(flags, FlowFlags) and (flags.min_overlap or 0) >= min(flags.train_size):
        raise CheckpointError(
            f"{path}: min_overlap is {flags.min_overlap}, train_size {list(flags.train_size)}",
            "neighbours share less than a tile",
        )
    return flags


def architecture(
    model: HaikuModel,
    shapes: Mapping[str, tuple[int, ...]],
    flags: Flags,
    parity: Parity,
    image_shape: tuple[int, int, int] | None = None,
) -> PerceiverConfig:
    """Our config of the parameters of such shapes. ``image_shape`` is the picture an image classifier will see.

    Raises CheckpointError: a parameter is missing, or no model of this kind has such shapes.
    """
    known = Shapes(model, shapes)
    encoder = _encoder(known, flags)
    if isinstance(flags, LanguageFlags):
        vocabulary_size, width = known.of(haiku_names.EMBEDDING, 2)
        tokens = TokenInput(vocabulary_size, known.of(haiku_names.TOKEN_POSITIONS, 2)[0], width)
        decoder = known.attention(known.decoder, flags.num_decoder_heads, "num_decoder_heads")
        config = architectures.language_model(tokens, encoder, replace(decoder, query_residual=False), parity)
    elif isinstance(flags, ImageFlags):
        image = _image_input(known, flags, parity, image_shape)
        config = architectures.image_classifier(image, encoder, known.of(f"{known.output}/b", 1)[0], parity)
    elif isinstance(flags, FlowFlags):
        features = known.of(f"{haiku_names.PATCHES_LINEAR}/w", 2)[1]
        bands = known.bands(known.num_input_channels, features, axes=2)
        config = architectures.optical_flow(*flags.train_size, encoder, parity, features, bands)
    else:
        config = _video_autoencoder(known, flags, encoder, parity)
    return _with_widths(config, known, flags)


def trained_image_size(model: HaikuModel, shapes: Mapping[str, tuple[int, ...]], flags: ImageFlags) -> tuple[int, int]:
    """(height, width) of the pictures that an image classifier was trained on. Raises CheckpointError."""
    if model != "imagenet-learned":
        return flags.image_size or (224, 224)
    positions = Shapes(model, shapes).of(haiku_names.PIXEL_POSITIONS, 2)[0]
    side = math.isqrt(positions)
    height, width = flags.image_size or (side, side)
    if height * width != positions:
        raise CheckpointError(
            f"{haiku_names.PIXEL_POSITIONS!r} has {positions} positions, a picture of {height} × {width} has"
            f" {height * width}",
            'give the size of the pictures: --config FILE.json with {"image_size": [HEIGHT, WIDTH]}',
        )
    return height, width


def _encoder(known: Shapes, flags: Flags) -> EncoderSizes:
    num_latents, num_channels = known.of(haiku_names.latents_name(known.model), 2)
    return EncoderSizes(
        num_latents=num_latents,
        num_latent_channels=num_channels,
        num_self_attentions_per_block=known.num_self_attentions,
        num_blocks=flags.num_blocks,
    )


def _with_widths(config: PerceiverConfig, known: Shapes, flags: Flags) -> PerceiverConfig:
    """``config`` with the widths of attention that the shapes have, whatever rule made them, and the flags' heads."""
    encoder, decoder = config.encoder, config.decoder
    assert isinstance(decoder, QueryDecoder)
    cross = known.attention(known.cross, flags.num_cross_attention_heads, "num_cross_attention_heads")
    # A block's layers have the same sizes.
    own = known.attention(known.self_attention, flags.num_self_attention_heads, "num_self_attention_heads")
    read = known.attention(known.decoder, flags.num_decoder_heads, "num_decoder_heads")
    return replace(
        config,
        encoder=replace(
            encoder,
            cross_attention=replace(cross, query_residual=encoder.cross_attention.query_residual),
            self_attention=own,
        ),
        decoder=replace(decoder, cross_attention=replace(read, query_residual=decoder.cross_attention.query_residual)),
    )


def _image_input(
    known: Shapes, flags: ImageFlags, parity: Parity, image_shape: tuple[int, int, int] | None
) -> ImageInput:
    trained = trained_image_size(known.model, known.shapes, flags)
    channels, height, width = image_shape or (_RGB, *trained)
    if channels != _RGB:
        raise CheckpointError(
            f"the picture has {channels} channels, the checkpoint reads {_RGB}", "give --shape image=3xHxW"
        )
    if known.model == "imagenet-learned":
        features = known.of(f"{haiku_names.PIXEL_CONV}/w", 4)[3]
        table = known.of(haiku_names.PIXEL_POSITIONS, 2)[1]
        projected = known.of(f"{haiku_names.POSITION_PROJECTION}/w", 2)[1]
        return architectures.image_input(
            "conv1x1", height, width, parity, trained, features, num_position_channels=(table, projected)
        )
    conv = known.model == "imagenet-conv"
    features = known.of(f"{haiku_names.DOWNSAMPLE_CONV}/w", 4)[3] if conv else _RGB
    bands = known.bands(known.num_input_channels, features, axes=2)
    image = architectures.image_input("conv" if conv else "pixels", height, width, parity, trained, features, bands)
    assert isinstance(flags, FourierImageFlags)
    resolution = flags.max_resolution or tuple(-(-side // 4) if conv else side for side in trained)
    return replace(image, positions=_positions(image.positions, bands, resolution))


def _video_autoencoder(known: Shapes, flags: VideoFlags, encoder: EncoderSizes, parity: Parity) -> PerceiverConfig:
    width, query_width = known.num_input_channels, known.num_query_channels
    samples_per_patch = known.of("audio_postprocessor/linear/b", 1)[0]
    sound_bands = known.bands(query_width, 0, 1, "decoder.paddings.sound")
    video_bands = known.bands(query_width, 0, 3, "decoder.paddings.video")
    step = flags.spatial_patch or known.spatial_patch(video_bands)
    _check_whole(flags, step, samples_per_patch)
    audio = (flags.audio_resolution or flags.num_samples,)
    frames = flags.image_resolution or (flags.num_frames, *(side // step for side in flags.image_size))
    sizes = VideoSizes(
        flags.num_frames,
        *flags.image_size,
        flags.num_samples,
        num_labels=known.of("classification_postprocessor/linear/b", 1)[0],
        spatial_patch=step,
        samples_per_patch=samples_per_patch,
        num_label_query_channels=known.of(haiku_names.LABEL_QUERY, 2)[1],
        num_output_channels=known.of(f"{known.output}/b", 1)[0],
    )
    config = architectures.video_autoencoder(sizes, encoder, parity)
    assert isinstance(config.decoder, QueryDecoder)
    inputs = {
        "audio": _array(config, "audio", known.bands(width, samples_per_patch, 1, "input_paddings.audio"), audio),
        "frames": _array(config, "frames", known.bands(width, _RGB * step**2, 3, "input_paddings.frames"), frames),
        "label": MaskedInput(1, width),
    }
    outputs = {
        **config.decoder.outputs,
        "sound": _queried(config.decoder.outputs["sound"], sound_bands, audio),
        "video": _queried(config.decoder.outputs["video"], video_bands, frames),
    }
    decoder = replace(config.decoder, outputs=outputs, num_query_channels=query_width)
    return replace(config, inputs=inputs, num_input_channels=width, decoder=decoder)


def _array(config: PerceiverConfig, name: str, bands: int, resolution: tuple[float, ...]) -> ArrayInput:
    array = config.inputs[name]
    assert isinstance(array, ArrayInput)
    return replace(array, positions=_positions(array.positions, bands, resolution))


def _queried(output: OutputConfig, bands: int, resolution: tuple[float, ...]) -> OutputConfig:
    assert isinstance(output.queries, PositionQueries)
    positions = _positions(output.queries.positions, bands, resolution)
    return replace(output, queries=replace(output.queries, positions=positions))


def _positions(positions: object, bands: int, resolution: tuple[float, ...]) -> FourierPositions:
    assert isinstance(positions, FourierPositions)
    return replace(positions, num_bands=bands, max_resolution=tuple(map(float, resolution)))


def _check_whole(flags: VideoFlags, step: int, samples_per_patch: int) -> None:
    height, width = flags.image_size
    for divides, values, patch in (
        (height % step == width % step == 0, f"frames of {height} × {width} have", f"{step} × {step}"),
        (flags.num_samples % samples_per_patch == 0, f"{flags.num_samples} samples are", samples_per_patch),
    ):
        if not divides:
            raise CheckpointError(
                f"{values} no whole number of patches of {patch}",
                "set image_size, spatial_patch and num_samples of the config to the sizes used in training",
            )
