# SPDX-License-Identifier: Apache-2.0
"""The papers' models as configs, at any size: the start of presets and Hugging Face checkpoints.

DeepMind's code and transformers' port of it differ. ``parity`` selects between them, only in this module: the GELU, the
answer to a query whose keys are all masked, whether masked queries read, the residual of one decoder, the padding of a
convolution, the precision of position tables.

Perceiver IO is arXiv 2107.14795. The first Perceiver, arXiv 2103.03206, reads its inputs more than once and averages
the latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from perceiver_export.exporter.model.config import (
    ArrayInput,
    AttentionConfig,
    AverageDecoder,
    EncoderConfig,
    Features,
    FourierPositions,
    FramePairInput,
    ImageInput,
    Input,
    InputQueries,
    LearnedPositions,
    LearnedQueries,
    MaskedInput,
    OutputConfig,
    PerceiverConfig,
    PositionQueries,
    Positions,
    QueryDecoder,
    Sharing,
    TokenInput,
)

Parity = Literal["huggingface", "deepmind"]

FLOW_SCALE = 20 / 100  # the network's output is divided by 100, and its targets were pixels divided by 20


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes of an encoder. ``num_v_channels`` defaults to ``num_qk_channels``, and that to the latents' width; in the
    cross-attention with ``width`` "kv", to the inputs' width.
    """

    num_latents: int
    num_latent_channels: int
    num_self_attentions_per_block: int
    num_blocks: int = 1
    num_cross_attention_heads: int = 1
    num_self_attention_heads: int = 8
    num_qk_channels: int | None = None
    num_v_channels: int | None = None
    cross_attention_widening_factor: int = 1
    self_attention_widening_factor: int = 1
    query_residual: bool = True
    width: Literal["kv", "q"] = "kv"

    def config(self, num_input_channels: int) -> EncoderConfig:
        """The encoder of inputs with ``num_input_channels``."""
        cross = num_input_channels if self.width == "kv" else self.num_latent_channels
        return EncoderConfig(
            num_latents=self.num_latents,
            num_latent_channels=self.num_latent_channels,
            num_blocks=self.num_blocks,
            num_self_attentions_per_block=self.num_self_attentions_per_block,
            cross_attention=AttentionConfig(
                num_heads=self.num_cross_attention_heads,
                num_qk_channels=self.num_qk_channels or cross,
                num_v_channels=self.num_v_channels or self.num_qk_channels or cross,
                widening_factor=self.cross_attention_widening_factor,
                query_residual=self.query_residual,
            ),
            self_attention=AttentionConfig(
                num_heads=self.num_self_attention_heads,
                num_qk_channels=self.num_qk_channels or self.num_latent_channels,
                num_v_channels=self.num_v_channels or self.num_qk_channels or self.num_latent_channels,
                widening_factor=self.self_attention_widening_factor,
            ),
        )

    def decoder_attention(self, num_query_channels: int, query_residual: bool, num_heads: int = 1) -> AttentionConfig:
        """A decoder's attention, as wide as the latents, or with ``width`` "q" as wide as the queries."""
        width = self.num_latent_channels if self.width == "kv" else num_query_channels
        return AttentionConfig(num_heads, width, width, query_residual=query_residual)


def fourier(num_bands: int, max_resolution: tuple[int, ...], parity: Parity, endpoint: bool = True) -> FourierPositions:
    """Fourier positions, computed in float32 as in transformers, or in float64: DeepMind's depend on the compiler."""
    return FourierPositions(num_bands, max_resolution, endpoint, "float32" if parity == "huggingface" else "float64")


def image_classifier(image: ImageInput, encoder: EncoderSizes, num_labels: int, parity: Parity) -> PerceiverConfig:
    """Images -> classes. DeepMind's model with learned positions has no query residual; transformers' port has one."""
    residual = parity == "huggingface" or image.features != "conv1x1"
    return _model({"image": image}, encoder, _classes(encoder, num_labels, residual), parity)


def image_input(
    features: Features, height: int, width: int, parity: Parity, trained_grid: tuple[int, int]
) -> ImageInput:
    """One of three image inputs. ``trained_grid``: the size of learned positions, or the resolution of Fourier ones.

    Raises UsageError: an image that is too small for the convolution.
    """
    channels = {"pixels": 3, "conv1x1": 256, "conv": 64}[features]
    padding: Literal["same", "huggingface"] = "huggingface" if parity == "huggingface" else "same"
    positions: Positions = fourier(64, trained_grid, parity)
    if features == "conv1x1":
        positions = LearnedPositions(trained_grid, 256, 256)
    return ImageInput(3, height, width, features, channels, positions, padding)


def language_model(
    tokens: TokenInput, encoder: EncoderSizes, decoder: AttentionConfig, parity: Parity
) -> PerceiverConfig:
    """Masked tokens -> scores of all tokens at every position, by the tied embedding."""
    queries = LearnedQueries(tokens.length, tokens.num_input_channels)
    outputs = {"logits": OutputConfig(queries, (tokens.length, tokens.vocabulary_size))}
    head = QueryDecoder(outputs, tokens.num_input_channels, decoder, tied_to="tokens")
    return _model({"tokens": tokens}, encoder, head, parity, mask_queries=True)


def multitask_text_classifier(
    tokens: TokenInput, encoder: EncoderSizes, num_labels: Mapping[str, int], parity: Parity
) -> PerceiverConfig:
    """Text -> the classes of several tasks, one learned query and one head each (Perceiver IO, section 4.1)."""
    width = encoder.num_latent_channels
    outputs = {task: OutputConfig(LearnedQueries(1, width), (count,), count) for task, count in num_labels.items()}
    decoder = QueryDecoder(outputs, width, encoder.decoder_attention(width, query_residual=True))
    return _model({"tokens": tokens}, encoder, decoder, parity)


def optical_flow(height: int, width: int, encoder: EncoderSizes, parity: Parity) -> PerceiverConfig:
    """Two frames -> the displacement of every pixel, in pixels; the inputs are the queries."""
    frames = FramePairInput(height, width, 64, fourier(64, (height, width), parity))
    channels = frames.num_input_channels
    outputs = {"flow": OutputConfig(InputQueries(height * width, channels), (height, width, 2), scale=FLOW_SCALE)}
    attention = encoder.decoder_attention(channels, query_residual=False)
    decoder = QueryDecoder(outputs, channels, attention, num_output_channels=2)
    return _model({"frames": frames}, encoder, decoder, parity)


@dataclass(frozen=True)
class VideoSizes:
    """A video with its sound; the defaults are those of DeepMind's model."""

    num_frames: int = 16
    height: int = 224
    width: int = 224
    num_samples: int = 30720
    num_labels: int = 700
    spatial_patch: int = 4
    samples_per_patch: int = 16
    image_bands: int = 32
    audio_bands: int = 192
    image_resolution: tuple[int, int] | None = None  # of the Fourier positions; by default the grid of patches
    num_label_query_channels: int = 1024
    num_output_channels: int = 512

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height, width."""
        return self.num_frames, self.height, self.width

    @property
    def resolution(self) -> tuple[int, int, int]:
        """That of the Fourier positions of ``shape``."""
        step = self.spatial_patch
        return self.num_frames, *(self.image_resolution or (self.height // step, self.width // step))


def video_autoencoder(sizes: VideoSizes, encoder: EncoderSizes, parity: Parity) -> PerceiverConfig:
    """Frames and sound -> themselves and a label. The label is never given: its mask token is the input."""
    positions = fourier(sizes.audio_bands, (sizes.num_samples,), parity)
    audio = ArrayInput((sizes.num_samples,), 1, (sizes.samples_per_patch,), positions=positions)
    positions = fourier(sizes.image_bands, sizes.resolution, parity)
    frames = ArrayInput(sizes.shape, 3, (1, sizes.spatial_patch, sizes.spatial_patch), positions=positions)
    # DeepMind pads every modality to 4 channels (queries: 2) more than the widest has.
    num_input_channels = max(audio.num_input_channels, frames.num_input_channels, sizes.num_labels) + 4
    inputs: dict[str, Input] = {"audio": audio, "frames": frames, "label": MaskedInput(1, num_input_channels)}
    return _model(inputs, encoder, _video_decoder(sizes, encoder, parity), parity)


def _video_decoder(sizes: VideoSizes, encoder: EncoderSizes, parity: Parity) -> QueryDecoder:
    """Queries are positions -1 + 2 i / n of pixels and audio patches, since both parities train on sampled points."""
    positions = fourier(sizes.audio_bands, (sizes.num_samples,), parity, endpoint=False)
    sound = PositionQueries((sizes.num_samples // sizes.samples_per_patch,), positions)
    video = PositionQueries(sizes.shape, fourier(sizes.image_bands, sizes.resolution, parity, endpoint=False))
    label = LearnedQueries(1, sizes.num_label_query_channels)
    num_query_channels = max(sound.num_channels, video.num_channels, label.num_channels) + 2
    outputs = {
        "sound": OutputConfig(sound, (sizes.num_samples, 1), sizes.samples_per_patch),
        "video": OutputConfig(video, (*sizes.shape, 3), 3),
        "label": OutputConfig(label, (sizes.num_labels,), sizes.num_labels),
    }
    attention = encoder.decoder_attention(num_query_channels, query_residual=False)
    return QueryDecoder(outputs, num_query_channels, attention, sizes.num_output_channels)


def classifier(
    inputs: Mapping[str, Input], encoder: EncoderSizes, num_labels: int, parity: Parity, num_input_channels: int = 0
) -> PerceiverConfig:
    """Any inputs -> classes, read by one learned query."""
    return _model(inputs, encoder, _classes(encoder, num_labels), parity, num_input_channels)


def set_transformer(
    num_elements: int, num_channels: int, num_output_channels: int, encoder: EncoderSizes, parity: Parity
) -> PerceiverConfig:
    """A set with a mask -> one output an element; the elements are the queries (Perceiver IO, section 4.4)."""
    entities = ArrayInput((num_elements,), num_channels, masked=True)
    outputs = {"outputs": OutputConfig(InputQueries(num_elements, num_channels), (num_elements, num_output_channels))}
    decoder = QueryDecoder(
        outputs, num_channels, encoder.decoder_attention(num_channels, query_residual=True), num_output_channels
    )
    return _model({"entities": entities}, encoder, decoder, parity, mask_queries=True)


def _classes(encoder: EncoderSizes, num_labels: int, residual: bool = True, width: int = 0) -> QueryDecoder:
    """Classes, read by one learned query of ``width`` channels, by default as many as latents have."""
    width = width or encoder.num_latent_channels
    outputs = {"logits": OutputConfig(LearnedQueries(1, width), (num_labels,))}
    return QueryDecoder(outputs, width, encoder.decoder_attention(width, residual), num_labels)


def _model(
    inputs: Mapping[str, Input],
    encoder: EncoderSizes,
    decoder: QueryDecoder | AverageDecoder,
    parity: Parity,
    num_input_channels: int = 0,
    mask_queries: bool = False,
) -> PerceiverConfig:
    width = max(num_input_channels, *(one.num_input_channels for one in inputs.values()))
    return PerceiverConfig(
        inputs=dict(inputs),
        num_input_channels=width,
        encoder=encoder.config(width),
        decoder=decoder,
        activation="gelu" if parity == "huggingface" else "gelu-tanh",
        masked_rows="mean" if parity == "huggingface" else "zero",
        mask_queries=mask_queries and parity == "deepmind",
    )


def own_model(
    inputs: Mapping[str, Input],
    outputs: Mapping[str, OutputConfig],
    encoder: EncoderSizes,
    num_decoder_heads: int = 1,
    query_residual: bool = False,
) -> PerceiverConfig:
    """Any inputs, any queries. Trained vectors pad inputs to the widest input, and queries to the widest queries."""
    width = max(output.queries.num_channels for output in outputs.values())
    attention = encoder.decoder_attention(width, query_residual, num_decoder_heads)
    return _model(inputs, encoder, QueryDecoder(dict(outputs), width, attention), "deepmind")


MODALITY_CHANNELS = 4  # trained channels beside the widest modality; the others are padded to the same width


@dataclass(frozen=True)
class AudioVideoSizes:
    """1.28 seconds: 61,440 samples in patches of 128, and 32 frames in patches of 2 × 8 × 8.

    With ``mel`` (frames, bins) the model hears a spectrogram: each value is an input. Of the paper's 487 channels, the
    384 values of a patch and 4 of the modality leave room for 16 bands per video axis.
    """

    num_samples: int = 61_440
    samples_per_patch: int = 128
    mel: tuple[int, int] | None = None
    num_frames: int = 32
    height: int = 224
    width: int = 224
    video_patch: tuple[int, int, int] = (2, 8, 8)
    audio_bands: int = 64
    video_bands: int = 16

    def inputs(self, parity: Parity) -> dict[str, Input]:
        """Patches of sound and frames with Fourier features of their places; bands end at the grid's Nyquist."""
        if self.mel is not None:
            sound = ArrayInput(self.mel, 1, positions=fourier(self.audio_bands, self.mel, parity))
        else:
            grid = (self.num_samples // self.samples_per_patch,)
            positions = fourier(self.audio_bands, grid, parity)
            sound = ArrayInput((self.num_samples,), 1, (self.samples_per_patch,), positions=positions)
        shape = (self.num_frames, self.height, self.width)
        places = tuple(size // step for size, step in zip(shape, self.video_patch, strict=True))
        frames = ArrayInput(shape, 3, self.video_patch, positions=fourier(self.video_bands, places, parity))
        return {"mel" if self.mel is not None else "audio": sound, "frames": frames}

    @property
    def num_input_channels(self) -> int:
        """Channels of every input after padding."""
        widest = max(one.num_input_channels for one in self.inputs("deepmind").values())
        return widest + MODALITY_CHANNELS


def audio_video_classifier(
    sizes: AudioVideoSizes, encoder: EncoderSizes, num_labels: int, parity: Parity, num_query_channels: int
) -> PerceiverConfig:
    """Sound and frames -> classes, read by one learned query of ``num_query_channels`` (Perceiver IO, table 6)."""
    decoder = _classes(encoder, num_labels, width=num_query_channels)
    return _model(sizes.inputs(parity), encoder, decoder, parity, sizes.num_input_channels)


def first_perceiver(
    inputs: Mapping[str, Input],
    encoder: EncoderSizes,
    num_labels: int,
    parity: Parity,
    num_cross_attentions: int,
    cross_attention_sharing: Sharing = "all-but-first",
    block_sharing: Sharing = "all",
    num_input_channels: int = 0,
) -> PerceiverConfig:
    """Any inputs -> classes. The inputs are read before each of the first ``num_cross_attentions`` blocks.

    By default weights are shared as in the paper's ImageNet model (appendix C): by all cross-attentions but the first,
    and by all blocks. The latents are averaged, then projected, without a norm.
    """
    config = _model(inputs, encoder, AverageDecoder(num_labels), parity, num_input_channels)
    repeated = msgspec.structs.replace(
        config.encoder,
        num_cross_attentions=num_cross_attentions,
        cross_attention_sharing=cross_attention_sharing,
        block_sharing=block_sharing,
    )
    return msgspec.structs.replace(config, encoder=repeated)


def point_input(num_points: int, num_bands: int, max_frequency: int, parity: Parity) -> ArrayInput:
    """Points (x, y, z) with a mask, as Fourier features with frequencies up to ``max_frequency``."""
    positions = fourier(num_bands, (2 * max_frequency,) * 3, parity)  # a resolution is twice its highest frequency
    return ArrayInput((num_points,), 3, value_positions=positions, masked=True)
