# SPDX-License-Identifier: Apache-2.0
"""All sizes of a Perceiver IO, as plain data.

A config says everything that is needed to build the torch model (`model.PerceiverIO`) and is written, as it is,
into the bundle's manifest under ``architecture``. Names are those of the papers: latents (N × D), inputs (M × C),
queries (O × F).
"""

from __future__ import annotations

from typing import Literal

import msgspec

Activation = Literal["gelu", "gelu-tanh"]


class FourierPositions(msgspec.Struct, frozen=True, tag="fourier", forbid_unknown_fields=True):
    """Fourier features of grid positions (Perceiver IO, appendix D): per axis the position, K sines, K cosines.

    ``max_resolution`` has one entry an axis; frequencies run linearly from 1 to ``max_resolution / 2``.
    ``arithmetic`` is the precision in which the table is computed before it is rounded to the model's:
    transformers computes in float32 always, and its float64 models can only be matched by doing the same.
    """

    num_bands: int
    max_resolution: tuple[int, ...]
    arithmetic: Literal["float32", "float64"] = "float64"

    @property
    def num_channels(self) -> int:
        return len(self.max_resolution) * (2 * self.num_bands + 1)


class LearnedPositions(msgspec.Struct, frozen=True, tag="learned", forbid_unknown_fields=True):
    """A trained table of ``prod(shape)`` × ``num_table_channels``, projected linearly to ``num_channels``."""

    shape: tuple[int, ...]
    num_table_channels: int
    num_channels: int


Positions = FourierPositions | LearnedPositions


class ImageInput(msgspec.Struct, frozen=True, tag="image", forbid_unknown_fields=True):
    """A picture, NCHW float32, as M × C inputs: features of each pixel (or patch) beside its position.

    ``features``: ``pixels`` are taken as they are; ``conv1x1`` maps them to ``num_feature_channels``; ``conv`` is
    a 7×7 stride 2 convolution, batch norm, ReLU and a 3×3 stride 2 max-pool. The padding of the last differs
    between DeepMind's code (``same``, as in TensorFlow) and transformers (``huggingface``: 3 on each side, no
    padding of the pool).
    """

    num_channels: int
    height: int
    width: int
    features: Literal["pixels", "conv1x1", "conv"]
    num_feature_channels: int
    positions: Positions
    padding: Literal["same", "huggingface"] = "huggingface"

    @property
    def num_input_channels(self) -> int:
        """C, the channels of one input: features and position."""
        return self.num_feature_channels + self.positions.num_channels


class EncoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One cross-attention from the inputs into N × D latents, then ``num_blocks`` times the same self-attentions.

    ``num_qk_channels`` and ``num_v_channels`` are the widths of the projected queries/keys and values; None
    means: C in the cross-attention and D in the self-attentions (DeepMind's ``shape_for_attn="kv"``).
    """

    num_latents: int
    num_latent_channels: int
    num_blocks: int
    num_self_attentions_per_block: int
    num_cross_attention_heads: int
    num_self_attention_heads: int
    num_qk_channels: int | None = None
    num_v_channels: int | None = None
    cross_attention_width: Literal["kv", "q"] = "kv"
    cross_attention_widening_factor: int = 1
    self_attention_widening_factor: int = 1
    query_residual: bool = True


class DecoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One cross-attention from the latents into O × F learned queries, then a linear layer to the outputs."""

    num_queries: int
    num_query_channels: int
    num_output_channels: int
    num_heads: int = 1
    cross_attention_width: Literal["kv", "q"] = "kv"
    widening_factor: int = 1
    query_residual: bool = True


class PerceiverConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Perceiver IO: input adapter, encoder, decoder."""

    input: ImageInput
    encoder: EncoderConfig
    decoder: DecoderConfig
    activation: Activation = "gelu"
