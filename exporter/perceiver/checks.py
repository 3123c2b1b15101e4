# SPDX-License-Identifier: Apache-2.0
"""Does a config make sense? Asked before torch is, whose errors speak of matrices."""

from __future__ import annotations

import math

import msgspec

from perceiver_export.exporter.perceiver.config import (
    AttentionConfig,
    EncoderConfig,
    InputQueries,
    MaskedInput,
    OutputConfig,
    PerceiverConfig,
    PositionQueries,
    QueryDecoder,
    TokenInput,
)
from perceiver_export.exporter.perceiver.input_checks import (
    check_input,
    check_positions,
    check_shape,
    check_sizes,
    check_table,
    require,
)
from perceiver_export.runtimes.errors import UsageError


def check_config(config: PerceiverConfig) -> None:
    """Raise UsageError where sizes contradict each other, or no model has them."""
    _check_types(config)
    require(
        any(not isinstance(one, MaskedInput) for one in config.inputs.values()),
        "the model has no inputs" + (" but those that are always masked" if config.inputs else ""),
        "give at least one",
    )
    for name, one in config.inputs.items():
        _check_name(name)
        check_input(name, one, config.num_input_channels)
    _check_encoder(config.encoder)
    if isinstance(config.decoder, QueryDecoder):
        _check_decoder(config, config.decoder)
    else:
        _check_name(config.decoder.output)
        check_sizes("the decoder", num_output_channels=config.decoder.num_output_channels)
    if config.mask_queries:
        _check_mask_queries(config)


def _check_types(config: PerceiverConfig) -> None:
    """Python does not ask whether a size is a number, or a word one of those that are known."""
    try:
        msgspec.convert(msgspec.to_builtins(config), PerceiverConfig)
    except (msgspec.ValidationError, TypeError) as error:
        raise UsageError(f"the config is none: {error}", "give each field what its type says") from error


def _check_encoder(encoder: EncoderConfig) -> None:
    check_sizes(
        "the encoder",
        num_latents=encoder.num_latents,
        num_latent_channels=encoder.num_latent_channels,
        num_blocks=encoder.num_blocks,
    )
    check_sizes("the encoder", least=0, num_self_attentions_per_block=encoder.num_self_attentions_per_block)
    require(
        1 <= encoder.num_cross_attentions <= encoder.num_blocks,
        f"the encoder has {encoder.num_cross_attentions} cross-attentions and {encoder.num_blocks} blocks",
        "inputs are read at least once, and at most once before each block",
    )
    _check_attention("the encoder's cross-attention", encoder.cross_attention)
    _check_attention("the encoder's self-attention", encoder.self_attention)


def _check_decoder(config: PerceiverConfig, decoder: QueryDecoder) -> None:
    _check_attention("the decoder's cross-attention", decoder.cross_attention)
    check_sizes("the decoder", least=0, num_output_channels=decoder.num_output_channels)
    require(bool(decoder.outputs), "the model has no outputs", "give at least one")
    require(
        decoder.tied_to is None or isinstance(config.inputs.get(decoder.tied_to), TokenInput),
        f"the decoder is tied to {decoder.tied_to!r}, which is no input of tokens",
        "name the TokenInput whose embedding it shares",
    )
    for name, output in decoder.outputs.items():
        _check_name(name)
        _check_queries(config, decoder, name, output)
        _check_output(config, decoder, name, output)


def _check_queries(config: PerceiverConfig, decoder: QueryDecoder, name: str, output: OutputConfig) -> None:
    where, queries = f"output {name!r}", output.queries
    if isinstance(queries, PositionQueries):
        check_shape(f"{where}: the grid of queries", queries.shape)
        check_positions(where, queries.positions, len(queries.shape))
    check_sizes(where, num_queries=queries.num_queries, num_query_channels=queries.num_channels)
    require(
        queries.num_channels <= decoder.num_query_channels,
        f"{where} has queries of {queries.num_channels} channels, the decoder {decoder.num_query_channels}",
        "num_query_channels is that of the widest queries, or more",
    )
    check_table(where, queries.num_queries, decoder.num_query_channels)
    if not isinstance(queries, InputQueries):
        return
    require(
        len(config.inputs) == 1,
        f"{where} has the inputs as queries, of which there are several kinds",
        "give it learned queries or positions",
    )
    (one,) = config.inputs.values()
    require(
        (queries.num_queries, queries.num_channels) == (one.num_inputs, config.num_input_channels),
        f"{where} has the inputs as queries, {queries.num_queries} × {queries.num_channels}; there are "
        f"{one.num_inputs} × {config.num_input_channels}",
        "InputQueries are as many as the inputs, and as wide",
    )


def _check_output(config: PerceiverConfig, decoder: QueryDecoder, name: str, output: OutputConfig) -> None:
    where, count = f"output {name!r}", output.queries.num_queries
    check_shape(where, output.shape)
    check_sizes(where, least=0, num_channels=output.num_channels)
    channels = output.num_channels or decoder.num_output_channels or decoder.num_query_channels
    tied = config.inputs.get(decoder.tied_to or "")
    if isinstance(tied, TokenInput):
        require(
            channels == tied.num_input_channels,
            f"{where} gives {channels} channels, the embedding that it is tied to has {tied.num_input_channels}",
            "they must be equal",
        )
        channels = tied.vocabulary_size
    require(
        math.prod(output.shape) == count * channels,
        f"{where} of shape {output.shape} does not hold {count} queries of {channels} channels",
        "their products must be equal",
    )


def _check_mask_queries(config: PerceiverConfig) -> None:
    """The mask of the inputs is laid over the queries, one on one."""
    require(
        any(isinstance(one, TokenInput) or getattr(one, "masked", False) for one in config.inputs.values()),
        "mask_queries is set, and no input has a mask",
        "leave mask_queries out",
    )
    outputs = config.decoder.outputs if isinstance(config.decoder, QueryDecoder) else {}
    num_inputs = sum(one.num_inputs for one in config.inputs.values())
    for name, output in outputs.items():
        queries = output.queries.num_queries
        require(
            queries == num_inputs,
            f"mask_queries is set, but output {name!r} has {queries} queries for {num_inputs} inputs",
            "leave mask_queries out, or give each input element one query",
        )


def _check_attention(where: str, attention: AttentionConfig) -> None:
    check_sizes(where, num_heads=attention.num_heads, widening_factor=attention.widening_factor)
    for width in (attention.num_qk_channels, attention.num_v_channels):
        require(
            width > 0 and width % attention.num_heads == 0,
            f"{where}: {width} channels cannot be split into {attention.num_heads} heads",
            "heads must divide the channels of queries, keys and values",
        )


def _check_name(name: str) -> None:
    from torch import nn  # here: configs are read without torch too

    # Modules and parameters are kept under these names, beside the attributes of what keeps them.
    taken = any(hasattr(keeper, name) for keeper in (nn.ModuleDict(), nn.ParameterDict()))
    taken = taken or name in ("latents", "queries") or name.endswith(("_mask", "_queries"))
    require(name.isidentifier() and not taken, f"{name!r} cannot be the name of an input or output", "choose another")
