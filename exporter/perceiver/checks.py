# SPDX-License-Identifier: Apache-2.0
"""Does a config make sense? Asked before torch is, whose errors speak of matrices."""

from __future__ import annotations

import math

from perceiver_export.exporter.perceiver.config import (
    ArrayInput,
    AttentionConfig,
    Input,
    InputQueries,
    LearnedPositions,
    OutputConfig,
    PerceiverConfig,
    PositionQueries,
    QueryDecoder,
    TokenInput,
)
from perceiver_export.runtimes.errors import UsageError


def check_config(config: PerceiverConfig) -> None:
    """Raise UsageError where sizes contradict each other."""
    _require(bool(config.inputs), "the model has no inputs", "give at least one")
    for name, one in config.inputs.items():
        _check_name(name)
        _check_input(name, one)
        _require(
            one.num_input_channels <= config.num_input_channels,
            f"input {name!r} has {one.num_input_channels} channels, num_input_channels is {config.num_input_channels}",
            "it is that of the widest input, or more",
        )
    _check_attention("the encoder's cross-attention", config.encoder.cross_attention)
    _check_attention("the encoder's self-attention", config.encoder.self_attention)
    if isinstance(config.decoder, QueryDecoder):
        _check_decoder(config, config.decoder)


def _check_input(name: str, one: Input) -> None:
    if not isinstance(one, ArrayInput):
        return
    patch = one.patch or (1,) * len(one.shape)
    fits = len(patch) == len(one.shape) and not any(size % step for size, step in zip(one.shape, patch, strict=True))
    _require(fits, f"input {name!r}: patches of {one.patch} do not divide {one.shape}", "give one size an axis")
    axes = len(one.shape)
    if one.positions is not None:
        positions = one.positions
        axes = len(positions.shape if isinstance(positions, LearnedPositions) else positions.max_resolution)
    _require(
        axes == len(one.shape),
        f"input {name!r} has {len(one.shape)} axes, its positions {axes}",
        "give positions as many entries as the array has axes",
    )
    if one.value_positions is not None:
        _require(
            len(one.value_positions.max_resolution) == one.num_channels and one.positions is None and not one.patch,
            f"input {name!r}: coordinates of {one.num_channels} channels do not fit its value_positions",
            "give max_resolution one entry a channel, and neither patch nor positions",
        )


def _check_decoder(config: PerceiverConfig, decoder: QueryDecoder) -> None:
    _check_attention("the decoder's cross-attention", decoder.cross_attention)
    _require(bool(decoder.outputs), "the model has no outputs", "give at least one")
    for name, output in decoder.outputs.items():
        _check_name(name)
        _check_output(config, decoder, name, output)
    tied = decoder.tied_to
    _require(
        tied is None or isinstance(config.inputs.get(tied), TokenInput),
        f"the decoder is tied to {tied!r}, which is no input of tokens",
        "name the TokenInput whose embedding it shares",
    )


def _check_output(config: PerceiverConfig, decoder: QueryDecoder, name: str, output: OutputConfig) -> None:
    queries = output.queries
    _require(
        queries.num_channels <= decoder.num_query_channels,
        f"output {name!r} has queries of {queries.num_channels} channels, the decoder {decoder.num_query_channels}",
        "num_query_channels is that of the widest queries, or more",
    )
    if isinstance(queries, PositionQueries):
        _require(
            len(queries.shape) == len(queries.positions.max_resolution),
            f"output {name!r} has queries on {len(queries.shape)} axes, positions on "
            f"{len(queries.positions.max_resolution)}",
            "give max_resolution one entry an axis",
        )
    if isinstance(queries, InputQueries):
        _require(
            len(config.inputs) == 1,
            f"output {name!r} has the inputs as queries, of which there are several kinds",
            "give it learned queries or positions",
        )
    channels = output.num_channels or decoder.num_output_channels or decoder.num_query_channels
    tied = config.inputs.get(decoder.tied_to or "")
    if isinstance(tied, TokenInput):
        channels = tied.vocabulary_size
    _require(
        math.prod(output.shape) == queries.num_queries * channels,
        f"output {name!r} of shape {output.shape} does not hold {queries.num_queries} queries of {channels} channels",
        "their products must be equal",
    )


def _check_attention(where: str, attention: AttentionConfig) -> None:
    for width in (attention.num_qk_channels, attention.num_v_channels):
        _require(
            attention.num_heads > 0 and width > 0 and width % attention.num_heads == 0,
            f"{where}: {width} channels cannot be split into {attention.num_heads} heads",
            "heads must divide the channels of queries, keys and values",
        )


def _check_name(name: str) -> None:
    taken = name in ("latents", "queries") or name.endswith(("_mask", "_queries"))
    _require(name.isidentifier() and not taken, f"{name!r} cannot be the name of an input or output", "choose another")


def _require(holds: bool, message: str, hint: str) -> None:
    if not holds:
        raise UsageError(message, hint)
