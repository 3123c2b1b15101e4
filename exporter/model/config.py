# SPDX-License-Identifier: Apache-2.0
"""All sizes of a Perceiver, as plain data: enough to build the torch model, `PerceiverIO`.

It is written to the bundle's manifest as ``architecture``. Names are those of the papers: latents (N × D), inputs
(M × C), queries (O × F). Perceiver IO is arXiv 2107.14795, Perceiver arXiv 2103.03206.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from perceiver_export.exporter.model.checks import MOST_LAYERS, MOST_PARAMETERS, Checked, check_size, require

Size = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(min_length=1)]
Resolution = Annotated[tuple[Annotated[float, msgspec.Meta(gt=0, le=1e12)], ...], msgspec.Meta(min_length=1)]

# DeepMind's GELU is the tanh approximation, transformers' the exact one. A config of transformers may name the others.
_Rectifier = Literal["relu", "relu6", "relu-squared", "leaky-relu"]
_Smooth = Literal["silu", "hardswish", "mish", "sqrt-softplus", "sigmoid", "tanh", "laplace", "linear"]
Activation = Literal["gelu", "gelu-tanh", "gelu-clipped", "quick-gelu", _Rectifier, _Smooth]
Sharing = Literal["all", "all-but-first", "none"]
MaskedRows = Literal["zero", "mean"]
Features = Literal["pixels", "conv1x1", "conv"]


class FourierPositions(Checked, frozen=True, tag="fourier"):
    """Fourier features of grid positions (Perceiver IO, appendix D): per axis the position, K sines, K cosines.

    ``max_resolution`` has one entry per axis; frequencies run linearly from 1 to ``max_resolution / 2``.
    ``endpoint``: positions run from -1 to 1 with both ends (linspace); without it they are -1 + 2 i / n, because
    DeepMind's decoders are trained on sampled points. ``arithmetic`` is the precision in which the table is computed
    before it is rounded to the model's. transformers always uses float32, also in float64 models.
    """

    num_bands: Count
    max_resolution: Resolution
    endpoint: bool = True
    arithmetic: Literal["float32", "float64"] = "float64"

    @property
    def num_channels(self) -> int:
        return len(self.max_resolution) * (2 * self.num_bands + 1)


class LearnedPositions(Checked, frozen=True, tag="learned"):
    """A trained table of ``prod(shape)`` × ``num_table_channels``, projected linearly to another width (0: none)."""

    shape: Shape
    num_table_channels: Size
    num_projected_channels: Count = 0

    @property
    def num_channels(self) -> int:
        return self.num_projected_channels or self.num_table_channels

    def check(self) -> None:
        check_size("the table of positions", math.prod(self.shape) * self.num_table_channels)


Positions = FourierPositions | LearnedPositions


def _check_axes(positions: Positions, num_axes: int) -> None:
    found = len(positions.max_resolution if isinstance(positions, FourierPositions) else positions.shape)
    require(found == num_axes, f"a grid of {num_axes} axes has positions of {found}")


class ImageInput(Checked, frozen=True, tag="image"):
    """An image, NCHW float32, as M × C inputs: the features of each pixel (or patch), then its position.

    ``features``: ``pixels`` are taken as they are; ``conv1x1`` maps them to ``num_feature_channels``; ``conv`` is a
    7×7 stride 2 convolution, batch norm, ReLU and a 3×3 stride 2 max-pool, padded as in DeepMind's code (``same``, as
    in TensorFlow) or in transformers (``huggingface``: 3 on each side for the convolution, none for the pool).
    """

    num_channels: Size
    height: Size
    width: Size
    features: Features
    num_feature_channels: Size
    positions: Positions
    padding: Literal["same", "huggingface"] = "huggingface"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of features: those of the image, or of the pool's output."""
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

    def check(self) -> None:
        fits = self.features != "pixels" or self.num_feature_channels == self.num_channels
        require(fits, f"num_feature_channels is {self.num_feature_channels}, but pixels have {self.num_channels}")
        small = f"an image of {self.height} × {self.width} is too small to convolve"
        require(min(self.grid) > 0, small, "give sides of 5 or more")
        _check_axes(self.positions, 2)


class FramePairInput(Checked, frozen=True, tag="frame-pair"):
    """Two frames, (B, 2, 3, H, W) float32: for each pixel, its projected 3×3 patches in both, then its position."""

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

    def check(self) -> None:
        _check_axes(self.positions, 2)


class TokenInput(Checked, frozen=True, tag="tokens"):
    """Tokens, (B, length) int32, and their mask: embeddings plus trained positions."""

    vocabulary_size: Size
    length: Size
    num_input_channels: Size

    @property
    def num_inputs(self) -> int:
        return self.length


class ArrayInput(Checked, frozen=True, tag="array"):
    """An array of any rank, channels last, (B, *shape, num_channels) float32: audio, video, voxels, points, sets.

    In this order: ``patch`` (one size per axis) moves each patch's values into channels; ``num_projected_channels``
    projects them linearly (0: as they are); ``positions`` of the grid of patches are appended. With
    ``value_positions``, the values are coordinates (points), and their Fourier features are the inputs. ``masked`` adds
    an input NAME_mask, (B, M) int32: 1 for an element, 0 where there is none.
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
        """The number of patches along each axis."""
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

    def check(self) -> None:
        patch = self.patch or (1,) * len(self.shape)
        whole = len(patch) == len(self.shape)
        whole = whole and not any(size % step for size, step in zip(self.shape, patch, strict=True))
        require(whole, f"patches of {self.patch} do not divide {self.shape}")
        if self.positions is not None:
            _check_axes(self.positions, len(self.shape))
        if isinstance(self.positions, LearnedPositions):
            shape = self.positions.shape
            require(shape == self.grid, f"there are {self.grid} patches, but positions of {shape}")
        if self.value_positions is not None:
            require(
                len(self.value_positions.max_resolution) == self.num_channels
                and (self.positions, self.patch, self.num_projected_channels) == (None, (), 0),
                f"coordinates of {self.num_channels} channels do not fit value_positions",
                "give max_resolution one entry for each channel, and neither patch, projection nor positions",
            )


class MaskedInput(Checked, frozen=True, tag="masked"):
    """A modality that is never given at inference: its trained mask token, ``num_inputs`` times.

    DeepMind's video autoencoder classifies in this way: its label is always masked.
    """

    num_inputs: Size
    num_input_channels: Size


Input = ImageInput | FramePairInput | TokenInput | ArrayInput | MaskedInput


class AttentionConfig(Checked, frozen=True):
    """Widths of one kind of attention layer. ``query_residual`` adds the queries to the result."""

    num_heads: Size
    num_qk_channels: Size
    num_v_channels: Size
    widening_factor: Size = 1
    query_residual: bool = True

    def check(self) -> None:
        for name, width in (("num_qk_channels", self.num_qk_channels), ("num_v_channels", self.num_v_channels)):
            require(width % self.num_heads == 0, f"{name} {width} cannot be split into {self.num_heads} heads")


class EncoderConfig(Checked, frozen=True):
    """Latents (N × D) that read the inputs, then ``num_blocks`` times some self-attentions.

    Perceiver IO reads the inputs once, before the first block; the first Perceiver reads them before each of the first
    ``num_cross_attentions`` blocks. ``*_sharing``: whether all of them share weights, all but the first, or none.
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

    def check(self) -> None:
        reads, blocks = self.num_cross_attentions, self.num_blocks
        require(reads <= blocks, f"the encoder has {reads} cross-attentions and {blocks} blocks")
        layers = self.num_blocks * (self.num_self_attentions_per_block + 1)
        check_size("the number of the encoder's layers", layers, MOST_LAYERS)
        one, width = self.self_attention, self.num_latent_channels
        weights = width * (2 * one.num_qk_channels + one.num_v_channels + 2 * width * one.widening_factor)
        distinct = 1 if self.block_sharing == "all" else self.num_blocks
        count = weights * self.num_self_attentions_per_block * distinct + self.num_latents * width
        check_size("the number of the encoder's parameters", count, MOST_PARAMETERS)


class _Rows(Checked, frozen=True):
    num_queries: Size
    num_channels: Size


class LearnedQueries(_Rows, frozen=True, tag="learned"):
    """Trained queries (O × F): one to classify, or one per position of a text."""


class PositionQueries(Checked, frozen=True, tag="positions"):
    """Fourier features of every point of a grid: pixels, samples."""

    shape: Shape
    positions: FourierPositions

    @property
    def num_queries(self) -> int:
        return math.prod(self.shape)

    @property
    def num_channels(self) -> int:
        return self.positions.num_channels

    def check(self) -> None:
        _check_axes(self.positions, len(self.shape))


class InputQueries(_Rows, frozen=True, tag="inputs"):
    """The model's own inputs (M × C), as in models of optical flow and of sets."""


class GivenQueries(_Rows, frozen=True, tag="given"):
    """Queries that the caller passes with each call, (O, F) float32, as an input named NAME_queries."""


Queries = LearnedQueries | PositionQueries | InputQueries | GivenQueries


class OutputConfig(Checked, frozen=True):
    """One row of ``num_channels`` per query, read from the latents.

    ``num_channels`` is the width of the output's own head; 0 means no head, so the decoder's ``num_output_channels``.
    ``shape`` is the output's shape without the batch, with as many elements as all rows. ``scale`` multiplies it.
    """

    queries: Queries
    shape: Shape
    num_channels: Count = 0
    scale: float = 1.0


class QueryDecoder(Checked, frozen=True, tag="queries"):
    """Perceiver IO's decoder: queries read the latents in one cross-attention.

    Narrower queries are padded with trained vectors to ``num_query_channels``. A linear layer to
    ``num_output_channels`` (0: none) and each output's head follow. ``tied_to`` names the `TokenInput` whose embedding
    is the last layer.
    """

    outputs: dict[str, OutputConfig]
    num_query_channels: Size
    cross_attention: AttentionConfig
    num_output_channels: Count = 0
    tied_to: str | None = None

    def check(self) -> None:
        require(bool(self.outputs), "the model has no outputs", "give at least one")
        for name, output in self.outputs.items():
            count, width = output.queries.num_queries, output.queries.num_channels
            most = self.num_query_channels
            require(width <= most, f"queries of {name!r} have {width} channels, but num_query_channels is {most}")
            check_size(f"the table of queries of {name!r}", count * most)


class AverageDecoder(Checked, frozen=True, tag="average"):
    """The first Perceiver's head: the mean of the latents, then a linear layer."""

    num_output_channels: Size
    output: str = "logits"


class PerceiverConfig(Checked, frozen=True):
    """Inputs by name in the order in which they are concatenated, an encoder, a decoder.

    Narrower inputs are padded with trained vectors to ``num_input_channels``. ``masked_rows``: a query whose keys are
    all masked reads zeros (DeepMind) or the mean of the values (transformers). ``mask_queries``: if the queries are the
    input's own elements, masked ones read zeros (DeepMind).
    """

    inputs: dict[str, Input]
    num_input_channels: Size
    encoder: EncoderConfig
    decoder: QueryDecoder | AverageDecoder
    activation: Activation = "gelu"
    masked_rows: MaskedRows = "mean"
    mask_queries: bool = False

    def check(self) -> None:
        require(
            any(not isinstance(one, MaskedInput) for one in self.inputs.values()),
            "the model has no inputs" + (" except those that are always masked" if self.inputs else ""),
            "give at least one",
        )
        for name, one in self.inputs.items():
            width, most = one.num_input_channels, self.num_input_channels
            require(width <= most, f"input {name!r} has {width} channels, but num_input_channels is {most}")
            check_size(f"the table of input {name!r}", one.num_inputs * most)
        maskable = any(isinstance(one, TokenInput) or getattr(one, "masked", False) for one in self.inputs.values())
        require(not self.mask_queries or maskable, "mask_queries is set, but no input has a mask", "leave it out")
        if isinstance(self.decoder, QueryDecoder):
            self._check_outputs(self.decoder)

    def _check_outputs(self, decoder: QueryDecoder) -> None:
        tied = self.inputs.get(decoder.tied_to or "")
        require(
            decoder.tied_to is None or isinstance(tied, TokenInput),
            f"the decoder is tied to {decoder.tied_to!r}, which is not a token input",
            "name the TokenInput whose embedding it shares",
        )
        num_inputs = sum(one.num_inputs for one in self.inputs.values())
        for name, output in decoder.outputs.items():
            count, width = output.queries.num_queries, output.queries.num_channels
            if isinstance(output.queries, InputQueries):
                require(
                    len(self.inputs) == 1 and (count, width) == (num_inputs, self.num_input_channels),
                    f"output {name!r} takes {count} × {width} inputs as queries, but there are {num_inputs} ×"
                    f" {self.num_input_channels} from {len(self.inputs)} inputs",
                )
            fits = not self.mask_queries or count == num_inputs
            require(fits, f"mask_queries is set, but output {name!r} has {count} queries for {num_inputs} inputs")
            channels = output.num_channels or decoder.num_output_channels or decoder.num_query_channels
            if isinstance(tied, TokenInput):
                width = tied.num_input_channels
                require(channels == width, f"output {name!r} has {channels} channels, but its tied embedding {width}")
                channels = tied.vocabulary_size
            require(
                math.prod(output.shape) == count * channels,
                f"output {name!r} of shape {output.shape} does not hold {count} queries of {channels} channels",
            )
