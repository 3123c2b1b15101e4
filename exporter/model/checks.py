# SPDX-License-Identifier: Apache-2.0
"""Rules that join several fields of a config. Single fields are bounded by their types in `config.py`.

Everything is checked before torch builds anything: its own errors speak of matrices.
"""

from __future__ import annotations

import math

import msgspec

from perceiver_export.exporter.model.config import (
    ArrayInput,
    AttentionConfig,
    EncoderConfig,
    FourierPositions,
    ImageInput,
    Input,
    InputQueries,
    LearnedPositions,
    MaskedInput,
    OutputConfig,
    PerceiverConfig,
    PositionQueries,
    Positions,
    QueryDecoder,
    TokenInput,
)
from perceiver_export.runtimes.errors import UsageError

_MOST = 1 << 31  # numbers of one table: 8 GiB, and several times as many while it is computed
_MOST_LAYERS = 4096  # eighty times the papers' deepest model; each is some twenty nodes of a graph
_MOST_PARAMETERS = 1 << 33  # 32 GiB in fp32, forty times the papers' largest


def require(holds: bool, message: str, hint: str) -> None:
    """Raise UsageError unless it ``holds``."""
    if not holds:
        raise UsageError(message, hint)


def check_config(config: PerceiverConfig) -> None:
    """Raise UsageError where fields have wrong types, contradict each other, or make a model too large to run."""
    for name, one in config.inputs.items() if isinstance(config.inputs, dict) else ():
        _check_fields(f"input {name!r}", one)
    _check_fields("the config", config)
    require(
        any(not isinstance(one, MaskedInput) for one in config.inputs.values()),
        "the model has no inputs" + (" except those that are always masked" if config.inputs else ""),
        "give at least one",
    )
    for name, one in config.inputs.items():
        _check_name(name)
        check_input(name, one, config.num_input_channels)
    _check_encoder(config.encoder)
    decoder = config.decoder
    if isinstance(decoder, QueryDecoder):
        _check_decoder(config, decoder)
    else:
        _check_name(decoder.output)
    if config.mask_queries:
        _check_mask_queries(config)


def check_input(name: str, one: Input, num_input_channels: int | None = None) -> None:
    """Raise UsageError where the sizes of an input contradict each other, or exceed the width of all inputs."""
    where = f"input {name!r}"
    _check_fields(where, one)
    if isinstance(one, ImageInput):
        _check_image(where, one)
    elif isinstance(one, ArrayInput):
        _check_array(where, one)
    positions = getattr(one, "positions", None)
    if positions is not None:
        _check_positions(where, positions, len(one.shape) if isinstance(one, ArrayInput) else 2)
    width = one.num_input_channels if num_input_channels is None else num_input_channels
    require(
        one.num_input_channels <= width,
        f"{where} has {one.num_input_channels} channels, num_input_channels is {width}",
        "set num_input_channels to the width of the widest input, or more",
    )
    _check_table(where, one.num_inputs, width)


def _check_fields(where: str, one: msgspec.Struct) -> None:
    """Python does not check the types and bounds that annotations state; msgspec does."""
    try:
        msgspec.convert(msgspec.to_builtins(one), type(one))
    except (msgspec.ValidationError, TypeError) as error:
        raise UsageError(f"{where} is not valid: {error}", "correct that field") from error


def _check_image(where: str, image: ImageInput) -> None:
    require(
        image.features != "pixels" or image.num_feature_channels == image.num_channels,
        f"{where}: features are the pixels of {image.num_channels} channels, but num_feature_channels is "
        f"{image.num_feature_channels}",
        "make both equal, or set features to conv1x1",
    )
    require(
        min(image.grid) > 0,
        f"{where}: {image.height} × {image.width} is too small to convolve",
        "give sides of 5 or more",
    )


def _check_array(where: str, one: ArrayInput) -> None:
    patch = one.patch or (1,) * len(one.shape)
    require(
        len(patch) == len(one.shape) and not any(size % step for size, step in zip(one.shape, patch, strict=True)),
        f"{where}: patches of {one.patch} do not divide {one.shape}",
        "give one size for each axis",
    )
    require(
        not isinstance(one.positions, LearnedPositions) or one.positions.shape == one.grid,
        f"{where} has {one.grid} patches, its positions are of {getattr(one.positions, 'shape', ())}",
        "give learned positions the shape of the grid of patches",
    )
    if one.value_positions is not None:
        require(
            len(one.value_positions.max_resolution) == one.num_channels
            and (one.positions, one.patch, one.num_projected_channels) == (None, (), 0),
            f"{where}: coordinates of {one.num_channels} channels do not fit its value_positions",
            "give max_resolution one entry for each channel, and neither patch, projection nor positions",
        )


def _check_positions(where: str, positions: Positions, num_axes: int) -> None:
    axes = positions.max_resolution if isinstance(positions, FourierPositions) else positions.shape
    require(
        len(axes) == num_axes,
        f"{where} has {num_axes} axes, its positions {len(axes)}",
        "give positions one entry for each axis",
    )
    if isinstance(positions, LearnedPositions):
        _check_table(where, math.prod(positions.shape), positions.num_table_channels)


def _check_table(where: str, rows: int, channels: int) -> None:
    require(rows * channels <= _MOST, f"{where} takes {rows} × {channels} numbers", f"give at most {_MOST} in all")


def _check_encoder(encoder: EncoderConfig) -> None:
    require(
        encoder.num_cross_attentions <= encoder.num_blocks,
        f"the encoder has {encoder.num_cross_attentions} cross-attentions and {encoder.num_blocks} blocks",
        "give at most one cross-attention for each block",
    )
    _check_attention("the encoder's cross-attention", encoder.cross_attention)
    _check_attention("the encoder's self-attention", encoder.self_attention)
    layers = encoder.num_blocks * (encoder.num_self_attentions_per_block + 1)
    require(layers <= _MOST_LAYERS, f"the encoder runs {layers:,} layers", f"give at most {_MOST_LAYERS:,}")
    one, width = encoder.self_attention, encoder.num_latent_channels
    weights = width * (2 * one.num_qk_channels + one.num_v_channels + 2 * width * one.widening_factor)
    distinct = 1 if encoder.block_sharing == "all" else encoder.num_blocks
    parameters = weights * encoder.num_self_attentions_per_block * distinct + encoder.num_latents * width
    require(
        parameters <= _MOST_PARAMETERS,
        f"the encoder has {parameters:,} parameters",
        f"give at most {_MOST_PARAMETERS:,}",
    )


def _check_attention(where: str, attention: AttentionConfig) -> None:
    for width in (attention.num_qk_channels, attention.num_v_channels):
        require(
            width % attention.num_heads == 0,
            f"{where}: {width} channels cannot be split into {attention.num_heads} heads",
            "choose heads that divide the channels of queries, keys and values",
        )


def _check_decoder(config: PerceiverConfig, decoder: QueryDecoder) -> None:
    _check_attention("the decoder's cross-attention", decoder.cross_attention)
    require(bool(decoder.outputs), "the model has no outputs", "give at least one")
    require(
        decoder.tied_to is None or isinstance(config.inputs.get(decoder.tied_to), TokenInput),
        f"the decoder is tied to {decoder.tied_to!r}, which is no input of tokens",
        "name the TokenInput whose embedding it shares",
    )
    for name, output in decoder.outputs.items():
        _check_name(name)
        _check_queries(config, decoder, f"output {name!r}", output)
        _check_output(config, decoder, f"output {name!r}", output)


def _check_queries(config: PerceiverConfig, decoder: QueryDecoder, where: str, output: OutputConfig) -> None:
    queries = output.queries
    if isinstance(queries, PositionQueries):
        _check_positions(where, queries.positions, len(queries.shape))
    require(
        queries.num_channels <= decoder.num_query_channels,
        f"{where} has queries of {queries.num_channels} channels, the decoder {decoder.num_query_channels}",
        "set num_query_channels to the width of the widest queries, or more",
    )
    _check_table(where, queries.num_queries, decoder.num_query_channels)
    if not isinstance(queries, InputQueries):
        return
    require(
        len(config.inputs) == 1,
        f"{where} takes the inputs as queries, but there are {len(config.inputs)} kinds of them",
        "give it learned queries or positions",
    )
    (one,) = config.inputs.values()
    require(
        (queries.num_queries, queries.num_channels) == (one.num_inputs, config.num_input_channels),
        f"{where} takes the inputs as queries, {queries.num_queries} × {queries.num_channels}; there are "
        f"{one.num_inputs} × {config.num_input_channels}",
        "give InputQueries the number and the width of the inputs",
    )


def _check_output(config: PerceiverConfig, decoder: QueryDecoder, where: str, output: OutputConfig) -> None:
    channels = output.num_channels or decoder.num_output_channels or decoder.num_query_channels
    tied = config.inputs.get(decoder.tied_to or "")
    if isinstance(tied, TokenInput):
        require(
            channels == tied.num_input_channels,
            f"{where} gives {channels} channels, the embedding that it is tied to has {tied.num_input_channels}",
            "make both equal",
        )
        channels = tied.vocabulary_size
    require(
        math.prod(output.shape) == output.queries.num_queries * channels,
        f"{where} of shape {output.shape} does not hold {output.queries.num_queries} queries of {channels} channels",
        "make both products equal",
    )


def _check_mask_queries(config: PerceiverConfig) -> None:
    """The mask of the inputs is applied to the queries one by one."""
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


def _check_name(name: str) -> None:
    from torch import nn  # here: configs are read without torch too

    # Modules and parameters are kept under these names, beside the attributes of what keeps them.
    taken = any(hasattr(keeper, name) for keeper in (nn.ModuleDict(), nn.ParameterDict()))
    taken = taken or name in ("latents", "queries") or name.endswith(("_mask", "_queries"))
    require(name.isidentifier() and not taken, f"{name!r} cannot name an input or output", "choose another name")
