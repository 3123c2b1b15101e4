# SPDX-License-Identifier: Apache-2.0
"""Parameters and FLOPs of a config, by arithmetic: no torch, and no model of gigabytes.

FLOPs are those of matrix products and convolutions, a multiply-add as 2, as both papers count (Perceiver IO, appendix
D). Normalisation, softmax and the like are left out, as there. Tests hold these sums to what torch counts when it runs
the same model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from perceiver_export.exporter.perceiver.config import (
    Activation,
    ArrayInput,
    AttentionConfig,
    EncoderConfig,
    FramePairInput,
    ImageInput,
    Input,
    LearnedPositions,
    LearnedQueries,
    MaskedInput,
    PerceiverConfig,
    Positions,
    QueryDecoder,
    Sharing,
    TokenInput,
)


@dataclass(frozen=True)
class Counts:
    """Numbers that are trained, and FLOPs of one sample."""

    parameters: int = 0
    flops: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.parameters + other.parameters, self.flops + other.flops)

    def repeated(self, times: int, distinct: int) -> Counts:
        """As many layers one after the other, of which ``distinct`` have weights of their own."""
        return Counts(self.parameters * distinct, self.flops * times)


def count(config: PerceiverConfig, num_queries: int | None = None) -> Counts:
    """Parameters and FLOPs of the whole model for one sample.

    FLOPs are for all queries, or for the first ``num_queries`` of each output; all parameters count either way.
    """
    total = Counts()
    num_inputs = 0
    for one in config.inputs.values():
        rows, counts = _input(one)
        num_inputs += rows
        total += counts + Counts(config.num_input_channels - one.num_input_channels)
    return total + _encoder(config, num_inputs) + _decoder(config, num_queries)


def _linear(rows: int, inputs: int, outputs: int, bias: bool = True) -> Counts:
    return Counts(inputs * outputs + bias * outputs, 2 * rows * inputs * outputs)


def _norm(channels: int) -> Counts:
    return Counts(2 * channels)


def _input(config: Input) -> tuple[int, Counts]:
    """How many inputs there are, and what making them takes."""
    if isinstance(config, ImageInput):
        return _image(config)
    if isinstance(config, FramePairInput):
        rows = config.height * config.width
        return rows, _linear(rows, 2 * 3 * 9, config.num_feature_channels) + _positions(config.positions, rows)
    if isinstance(config, TokenInput):
        return config.length, Counts((config.vocabulary_size + config.length) * config.num_input_channels)
    if isinstance(config, MaskedInput):
        return config.num_inputs, Counts(config.num_input_channels)
    return _array(config)


def _array(config: ArrayInput) -> tuple[int, Counts]:
    rows, counts = math.prod(config.grid), Counts()
    if config.num_projected_channels:
        counts = _linear(rows, config.num_channels * math.prod(config.patch), config.num_projected_channels)
    return rows, counts + _positions(config.positions, rows)


def _image(config: ImageInput) -> tuple[int, Counts]:
    if config.features != "conv":
        rows = config.height * config.width
        projected = config.features == "conv1x1"
        counts = _linear(rows, config.num_channels, config.num_feature_channels) if projected else Counts()
        return rows, counts + _positions(config.positions, rows)
    # Every step halves: SAME padding rounds up; transformers pads the convolution with 3, and the pool not at all.
    sides = [(side + 1) // 2 for side in (config.height, config.width)]
    pooled = [(side + 1) // 2 if config.padding == "same" else (side - 1) // 2 for side in sides]
    convolution = _linear(math.prod(sides), 49 * config.num_channels, config.num_feature_channels, bias=False)
    batch_norm = _norm(config.num_feature_channels)
    return math.prod(pooled), convolution + batch_norm + _positions(config.positions, math.prod(pooled))


def _positions(config: Positions | None, rows: int) -> Counts:
    if not isinstance(config, LearnedPositions):
        return Counts()
    table = Counts(math.prod(config.shape) * config.num_table_channels)
    if not config.num_projected_channels:
        return table
    return table + _linear(rows, config.num_table_channels, config.num_projected_channels)


def _attention(config: AttentionConfig, rows: int, channels: int, num_inputs: int, num_input_channels: int) -> Counts:
    qk, v = config.num_qk_channels, config.num_v_channels
    return (
        _linear(rows, channels, qk, config.qkv_bias)
        + _linear(num_inputs, num_input_channels, qk, config.qkv_bias)
        + _linear(num_inputs, num_input_channels, v, config.qkv_bias)
        + Counts(flops=2 * rows * num_inputs * (qk + v))
        + _linear(rows, v, channels)
    )


def _mlp(rows: int, channels: int, widening_factor: int, activation: Activation) -> Counts:
    width = widening_factor * channels
    hidden = 2 * width if activation == "geglu" else width
    return _norm(channels) + _linear(rows, channels, hidden) + _linear(rows, width, channels)


def _encoder(model: PerceiverConfig, num_inputs: int) -> Counts:
    config, activation = model.encoder, model.activation
    rows, channels = config.num_latents, config.num_latent_channels
    cross, own = config.cross_attention, config.self_attention
    read = (
        _norm(channels)
        + _norm(model.num_input_channels)
        + _attention(cross, rows, channels, num_inputs, model.num_input_channels)
        + _mlp(rows, channels, cross.widening_factor, activation)
    )
    layer = (
        _norm(channels)
        + _attention(own, rows, channels, rows, channels)
        + _mlp(rows, channels, own.widening_factor, activation)
    )
    depth = config.num_self_attentions_per_block
    block = layer.repeated(depth, distinct=depth)
    reads = min(config.num_cross_attentions, config.num_blocks)
    return (
        Counts(rows * channels)
        + read.repeated(reads, _distinct(config.num_cross_attentions, config.cross_attention_sharing))
        + block.repeated(config.num_blocks, _distinct(config.num_blocks, config.block_sharing))
    )


def _distinct(times: int, sharing: Sharing) -> int:
    return {"all": 1, "all-but-first": min(times, 2), "none": times}[sharing]


def _decoder(model: PerceiverConfig, num_queries: int | None) -> Counts:
    config, encoder = model.decoder, model.encoder
    if not isinstance(config, QueryDecoder):
        norm = _norm(encoder.num_latent_channels) if config.norm else Counts()
        return norm + _linear(1, encoder.num_latent_channels, config.num_output_channels)
    tokens = model.inputs.get(config.tied_to or "")
    vocabulary_size = tokens.vocabulary_size if isinstance(tokens, TokenInput) else 0
    total = Counts(vocabulary_size)  # the bias; the matrix is the input's
    for index, output in enumerate(config.outputs.values()):
        queries = output.queries
        rows = queries.num_queries if num_queries is None else min(num_queries, queries.num_queries)
        read = _query_layers(config, encoder, rows, model.activation)
        total += read if index == 0 else Counts(flops=read.flops)  # all outputs share these layers
        if isinstance(queries, LearnedQueries):
            total += Counts(queries.num_queries * queries.num_channels)
        total += Counts(config.num_query_channels - queries.num_channels)
        width = config.num_output_channels or config.num_query_channels
        if output.num_channels:
            total += _linear(rows, width, output.num_channels)
        total += Counts(flops=2 * rows * width * vocabulary_size)
    return total


def _query_layers(config: QueryDecoder, encoder: EncoderConfig, rows: int, activation: Activation) -> Counts:
    width, num_latent_channels = config.num_query_channels, encoder.num_latent_channels
    layers = (
        _norm(width)
        + _norm(num_latent_channels)
        + _attention(config.cross_attention, rows, width, encoder.num_latents, num_latent_channels)
    )
    if config.mlp:
        layers += _mlp(rows, width, config.cross_attention.widening_factor, activation)
    return layers + (_linear(rows, width, config.num_output_channels) if config.num_output_channels else Counts())
