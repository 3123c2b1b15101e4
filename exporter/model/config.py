# SPDX-License-Identifier: Apache-2.0
"""All sizes of a Perceiver, as plain data.

A config says everything that is needed to build the torch model (`model.PerceiverIO`) and is written, as it is,
into the bundle's manifest under ``architecture``. Names are those of the papers: latents (N × D), inputs (M × C),
queries (O × F). Perceiver IO is arXiv 2107.14795, Perceiver arXiv 2103.03206.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

Size = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(min_length=1)]
Resolution = Annotated[tuple[Annotated[float, msgspec.Meta(gt=0, le=1e12)], ...], msgspec.Meta(min_length=1)]

# DeepMind's GELU is the tanh approximation, transformers' the exact one; GEGLU is lucidrains' gated one. The others are
# those that a config of transformers may name.
Activation = Literal[
    "gelu",
    "gelu-tanh",
    "geglu",
    "gelu-clipped",
    "quick-gelu",
    "relu",
    "relu6",
    "relu-squared",
    "leaky-relu",
    "silu",
    "hardswish",
    "mish",
    "sqrt-softplus",
    "sigmoid",
    "tanh",
    "laplace",
    "linear",
]
Sharing = Literal["all", "all-but-first", "none"]


class FourierPositions(msgspec.Struct, frozen=True, tag="fourier", forbid_unknown_fields=True):
    """Fourier features of grid positions (Perceiver IO, appendix D): per axis the position, K sines, K cosines.

    ``max_resolution`` has one entry an axis; frequencies run linearly from 1 to ``max_resolution / 2``.
    ``endpoint``: positions run from -1 to 1 with both ends (linspace); without, they are -1 + 2 i / n, as DeepMind's
    decoders are trained on sampled points. ``order``: all positions, all sines, all cosines, or axis after axis
    sines, cosines, position (lucidrains). ``arithmetic`` is the precision in which the table is computed before it is
    rounded to the model's: transformers computes in float32 always, and its float64 models can only be matched by
    doing the same.
    """

    num_bands: Count
    max_resolution: Resolution
    endpoint: bool = True
    order: Literal["positions-first", "axis-by-axis"] = "positions-first"
    arithmetic: Literal["float32", "float64"] = "float64"

    @property
    def num_channels(self) -> int:
        return len(self.max_resolution) * (2 * self.num_bands + 1)


class LearnedPositions(msgspec.Struct, frozen=True, tag="learned", forbid_unknown_fields=True):
    """A trained table of ``prod(shape)`` × ``num_table_channels``, projected linearly to another width (0: not)."""

    shape: Shape
    num_table_channels: Size
    num_projected_channels: Count = 0

    @property
    def num_channels(self) -> int:
        return self.num_projected_channels or self.num_table_channels


Positions = FourierPositions | LearnedPositions


class ImageInput(msgspec.Struct, frozen=True, tag="image", forbid_unknown_fields=True):
    """A picture, NCHW float32, as M × C inputs: features of each pixel (or patch) beside its position.

    ``features``: ``pixels`` are taken as they are; ``conv1x1`` maps them to ``num_feature_channels``; ``conv`` is
    a 7×7 stride 2 convolution, batch norm, ReLU and a 3×3 stride 2 max-pool. The padding of the last differs
    between DeepMind's code (``same``, as in TensorFlow) and transformers (``huggingface``: 3 on each side, no
    padding of the pool).
    """

    num_channels: Size
    height: Size
    width: Size
    features: Literal["pixels", "conv1x1", "conv"]
    num_feature_channels: Size
    positions: Positions
    padding: Literal["same", "huggingface"] = "huggingface"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of features: pixels, or what the convolution and the pool leave of them."""
        if self.features != "conv":
            return self.height, self.width
        halves = (-(-side // 2) for side in (self.height, self.width))
        height, width = (-(-half // 2) if self.padding == "same" else (half - 1) // 2 for half in halves)
        return height, width

    @property
    def num_inputs(self) -> int:
        return math.prod(self.grid)

    @property
    def num_input_channels(self) -> int:
        return self.num_feature_channels + self.positions.num_channels


class FramePairInput(msgspec.Struct, frozen=True, tag="frame-pair", forbid_unknown_fields=True):
    """Two frames, (B, 2, 3, H, W) float32: of each pixel the 3×3 patches of both, projected, beside its position."""

    height: Size
    width: Size
    num_feature_channels: Size
    positions: Positions

    @property
    def num_inputs(self) -> int:
        return self.height * self.width

    @property
    def num_input_channels(self) -> int:
        return self.num_feature_channels + self.positions.num_channels


class TokenInput(msgspec.Struct, frozen=True, tag="tokens", forbid_unknown_fields=True):
    """Tokens, (B, length) int32, and their mask: embeddings plus trained positions."""

    vocabulary_size: Size
    length: Size
    num_input_channels: Size

    @property
    def num_inputs(self) -> int:
        return self.length


class ArrayInput(msgspec.Struct, frozen=True, tag="array", forbid_unknown_fields=True):
    """An array of any rank, channels last, (B, *shape, num_channels) float32: audio, video, voxels, points, sets.

    In this order: ``patch`` (one size an axis) moves each patch's values into channels; ``num_projected_channels``
    projects them linearly (0: not); ``positions`` of the grid of patches are put beside them. Or ``value_positions``:
    the values are themselves coordinates (points), and their Fourier features the inputs. ``masked`` adds an input
    NAME_mask, (B, M) int32, that says which are there.
    """

    shape: Shape
    num_channels: Size
    patch: tuple[Size, ...] = ()
    num_projected_channels: Count = 0
    positions: Positions | None = None
    value_positions: FourierPositions | None = None
    masked: bool = False

    @property
    def grid(self) -> tuple[int, ...]:
        """How many patches there are along each axis."""
        patch = self.patch or (1,) * len(self.shape)
        return tuple(size // step for size, step in zip(self.shape, patch, strict=True))

    @property
    def num_inputs(self) -> int:
        return math.prod(self.grid)

    @property
    def num_input_channels(self) -> int:
        if self.value_positions is not None:
            return self.value_positions.num_channels  # the values themselves are the first of them
        features = self.num_projected_channels or self.num_channels * math.prod(self.patch)
        return features + (self.positions.num_channels if self.positions is not None else 0)


class MaskedInput(msgspec.Struct, frozen=True, tag="masked", forbid_unknown_fields=True):
    """A modality that is never given at inference: its trained mask token, ``num_inputs`` times.

    So DeepMind's video autoencoder classifies: its label is always masked.
    """

    num_inputs: Size
    num_input_channels: Size


Input = ImageInput | FramePairInput | TokenInput | ArrayInput | MaskedInput


class AttentionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Widths of one kind of attention layer. ``query_residual`` adds the queries to what they read."""

    num_heads: Size
    num_qk_channels: Size
    num_v_channels: Size
    widening_factor: Size = 1
    query_residual: bool = True
    qkv_bias: bool = True


class EncoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Latents (N × D) that read the inputs, then ``num_blocks`` times some self-attentions.

    Perceiver IO reads the inputs once, before the first block; the first Perceiver again before each of the first
    ``num_cross_attentions`` blocks. ``*_sharing``: whether all of them have the same weights, or all but the first.
    """

    num_latents: Size
    num_latent_channels: Size
    num_blocks: Size
    num_self_attentions_per_block: Count
    cross_attention: AttentionConfig
    self_attention: AttentionConfig
    num_cross_attentions: Size = 1
    cross_attention_sharing: Sharing = "all"
    block_sharing: Sharing = "all"


class LearnedQueries(msgspec.Struct, frozen=True, tag="learned", forbid_unknown_fields=True):
    """Trained queries (O × F): one for a class, one a position of a text."""

    num_queries: Size
    num_channels: Size


class PositionQueries(msgspec.Struct, frozen=True, tag="positions", forbid_unknown_fields=True):
    """Fourier features of every point of a grid: pixels, samples."""

    shape: Shape
    positions: FourierPositions

    @property
    def num_queries(self) -> int:
        return math.prod(self.shape)

    @property
    def num_channels(self) -> int:
        return self.positions.num_channels


class InputQueries(msgspec.Struct, frozen=True, tag="inputs", forbid_unknown_fields=True):
    """The model's own inputs (M × C), as optical flow and sets have it."""

    num_queries: Size
    num_channels: Size


class GivenQueries(msgspec.Struct, frozen=True, tag="given", forbid_unknown_fields=True):
    """Queries that the caller gives with each call, (O, F) float32: an input named NAME_queries."""

    num_queries: Size
    num_channels: Size


Queries = LearnedQueries | PositionQueries | InputQueries | GivenQueries


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is read from the latents: one row of ``num_channels`` a query.

    ``num_channels`` of a head of its own; 0 takes the decoder's ``num_output_channels``. ``shape`` is that of the
    output without the batch, of as many elements. ``scale`` multiplies it.
    """

    queries: Queries
    shape: Shape
    num_channels: Count = 0
    scale: float = 1.0


class QueryDecoder(msgspec.Struct, frozen=True, tag="queries", forbid_unknown_fields=True):
    """Perceiver IO's decoder: queries read the latents in one cross-attention.

    Queries of several outputs are padded with trained vectors to ``num_query_channels``. Then a linear layer to
    ``num_output_channels`` (0: none), then each output's head. ``tied_to`` names the `TokenInput` whose embedding
    is the last layer.
    """

    outputs: dict[str, OutputConfig]
    num_query_channels: Size
    cross_attention: AttentionConfig
    num_output_channels: Count = 0
    tied_to: str | None = None
    mlp: bool = True


class AverageDecoder(msgspec.Struct, frozen=True, tag="average", forbid_unknown_fields=True):
    """The first Perceiver's head: the mean of the latents, a LayerNorm (lucidrains) or none, a linear layer."""

    num_output_channels: Size
    norm: bool = False
    output: str = "logits"


class PerceiverConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Inputs by name in the order in which they are concatenated, an encoder, a decoder.

    With several inputs each is padded with a trained vector to ``num_input_channels``. ``masked_rows``: a query whose
    keys are all masked reads zeros (DeepMind) or the mean of the values (transformers). ``mask_queries``: where
    queries stand for the input's own elements, those that are masked read zeros (DeepMind).
    """

    inputs: dict[str, Input]
    num_input_channels: Size
    encoder: EncoderConfig
    decoder: QueryDecoder | AverageDecoder
    activation: Activation = "gelu"
    masked_rows: Literal["zero", "mean"] = "mean"
    mask_queries: bool = False
