# SPDX-License-Identifier: Apache-2.0
"""The JSON file beside a lucidrains state dict: the arguments of its model, and what else an export needs to know."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from perceiver_export.exporter.checkpoints.json_config import decode_json, read_bytes
from perceiver_export.exporter.perceiver.config import (
    ArrayInput,
    AttentionConfig,
    AverageDecoder,
    EncoderConfig,
    FourierPositions,
    GivenQueries,
    ImageInput,
    Input,
    LearnedQueries,
    OutputConfig,
    PerceiverConfig,
    QueryDecoder,
)
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError

_RGB = 3
_WIDENING = 4  # of all of lucidrains' MLPs
_MOST_ELEMENTS = 1 << 26  # more than any Perceiver reads, less than what memory is asked for in vain
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_CountOrZero = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
_Frequency = Annotated[float, msgspec.Meta(gt=0, le=1 << 24)]


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Arguments of both classes with their defaults; those that no inference reads are allowed and ignored.

    Not of lucidrains: ``input_shape``, sizes of the input's axes without batch and channels; ``masked``, whether
    calls give a mask; ``prefix``, what stands before the model's names where it is a part of another module.
    """

    input_shape: tuple[_Count, ...]
    depth: _Count
    num_latents: _Count = 512
    latent_dim: _Count = 512
    cross_heads: _Count = 1
    latent_heads: _Count = 8
    cross_dim_head: _Count = 64
    latent_dim_head: _Count = 64
    weight_tie_layers: bool = False
    inverted_cross_attn: bool | list[bool] = False
    attn_residual: bool = False
    attn_residual_rank: int = 64
    masked: bool = False
    prefix: str = ""


class Perceiver(_Arguments, frozen=True, tag_field="class", tag="Perceiver", kw_only=True):
    """Of ``Perceiver``. With ``task`` image-classification it reads pictures, else arrays.

    ``preprocessor`` are the steps before it, in the words of a preprocessor_config.json of transformers.
    """

    num_freq_bands: _Count
    max_freq: _Frequency
    input_channels: _Count = 3
    input_axis: _Count = 2
    num_classes: _Count = 1000
    fourier_encode_data: bool = True
    self_per_cross_attn: _CountOrZero = 1
    final_classifier_head: bool = True
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    task: Literal["image-classification", "arrays"] = "arrays"
    labels: tuple[str, ...] = ()
    preprocessor: dict[str, Any] = {}

    @property
    def num_input_channels(self) -> int:
        encoded = self.input_axis * (2 * self.num_freq_bands + 1) if self.fourier_encode_data else 0
        return self.input_channels + encoded


class PerceiverIO(_Arguments, frozen=True, tag_field="class", tag="PerceiverIO", kw_only=True):
    """Of ``PerceiverIO``, and its queries: ``num_queries`` that each call gives, or trained ones, ``queries``, the
    name of a tensor (O, queries_dim) in the checkpoint or in ``queries_file`` beside the config.
    """

    dim: _Count
    queries_dim: _Count
    logits_dim: _Count | None = None
    decoder_ff: bool = False
    seq_dropout_prob: float = 0.0
    num_queries: _Count | None = None
    queries: str | None = None
    queries_file: str | None = None
    task: Literal["arrays"] = "arrays"

    @property
    def num_input_channels(self) -> int:
        return self.dim

    @property
    def output(self) -> str:
        """What the output is called."""
        return "outputs" if self.logits_dim is None else "logits"


Arguments = Perceiver | PerceiverIO
_CLASSES: dict[str, type[Arguments]] = {"Perceiver": Perceiver, "PerceiverIO": PerceiverIO}


class _Class(msgspec.Struct, rename={"name": "class"}):
    name: str = ""


def read_arguments(path: Path) -> Arguments:
    """The JSON file of a model. Raises CheckpointError, UnsupportedModelError."""
    content = read_bytes(path, "a JSON file of the model's arguments")
    name = decode_json(content, _Class, str(path)).name
    if name not in _CLASSES:
        found = f"class is {name!r}" if name else "there is no class"
        raise CheckpointError(f"{path}: {found}", f'say which: "class": one of {", ".join(map(repr, _CLASSES))}')
    arguments = decode_json(content, _CLASSES[name], str(path))
    _check(path, arguments)
    return arguments


def architecture(arguments: Arguments, num_queries: int = 0) -> PerceiverConfig:
    """Our config of lucidrains' model. ``num_queries`` of the trained ones; 0 where the caller gives them."""
    cross = AttentionConfig(
        arguments.cross_heads, *(2 * (arguments.cross_heads * arguments.cross_dim_head,)), _WIDENING, qkv_bias=False
    )
    decoder: AverageDecoder | QueryDecoder
    if isinstance(arguments, Perceiver):
        inputs, decoder = _classifier_input(arguments), AverageDecoder(arguments.num_classes, norm=True)
    else:
        inputs = {"data": ArrayInput(arguments.input_shape, arguments.dim, masked=arguments.masked)}
        decoder = _decoder(arguments, cross, num_queries)
    return PerceiverConfig(
        inputs=inputs,
        num_input_channels=arguments.num_input_channels,
        encoder=_encoder(arguments, cross),
        decoder=decoder,
        activation="geglu",
    )


def _check(path: Path, arguments: Arguments) -> None:
    inverted = arguments.inverted_cross_attn
    if arguments.attn_residual or (any(inverted) if isinstance(inverted, list) else inverted):
        field = "attn_residual" if arguments.attn_residual else "inverted_cross_attn"
        raise UnsupportedModelError(f"{path}: {field} is not supported", f"train the model without {field}")
    if math.prod(arguments.input_shape) > _MOST_ELEMENTS:
        raise CheckpointError(
            f"{path}: input_shape has {math.prod(arguments.input_shape)} elements", f"{_MOST_ELEMENTS} are the most"
        )
    if isinstance(arguments, PerceiverIO):
        _check_queries(path, arguments)
    else:
        _check_classifier(path, arguments)
    axes = 1 if isinstance(arguments, PerceiverIO) else arguments.input_axis
    if len(arguments.input_shape) != axes:
        raise CheckpointError(
            f"{path}: input_shape has {len(arguments.input_shape)} axes, the model's input has {axes}",
            "give sizes without batch and channels, such as [224, 224]",
        )


def _check_queries(path: Path, arguments: PerceiverIO) -> None:
    if (arguments.num_queries is None) == (arguments.queries is None):
        raise CheckpointError(
            f"{path}: {'both num_queries and' if arguments.queries else 'neither num_queries nor'} queries are given",
            'give "num_queries": N where each call brings its queries, or "queries": NAME of the trained ones\' tensor',
        )
    if arguments.queries_file is not None and arguments.queries is None:
        raise CheckpointError(
            f"{path}: queries_file without queries", 'name the tensor in it too: "queries": "queries"'
        )


def _check_classifier(path: Path, arguments: Perceiver) -> None:
    if not arguments.final_classifier_head:
        raise UnsupportedModelError(
            f"{path}: without final_classifier_head the model has no output but its latents",
            "export a model with its head, or read the latents with a PerceiverIO",
        )
    if arguments.labels and len(arguments.labels) != arguments.num_classes:
        raise CheckpointError(
            f"{path}: {len(arguments.labels)} labels, num_classes is {arguments.num_classes}", "name each class"
        )
    is_rgb = arguments.input_axis == 2 and arguments.input_channels == _RGB and arguments.fourier_encode_data
    if arguments.task == "image-classification" and (arguments.masked or not is_rgb):
        raise CheckpointError(
            f"{path}: task image-classification is for pictures of 3 channels with Fourier positions, without a mask",
            "leave task out: the bundle then takes arrays",
        )


def _classifier_input(arguments: Perceiver) -> dict[str, Input]:
    # float32: the table is computed in the precision of the data, and so comes out bit-equal.
    positions = FourierPositions(
        arguments.num_freq_bands,
        (arguments.max_freq,) * arguments.input_axis,
        order="axis-by-axis",
        arithmetic="float32",
    )
    channels = arguments.input_channels
    if arguments.task == "image-classification":
        height, width = arguments.input_shape
        return {"image": ImageInput(channels, height, width, "pixels", channels, positions)}
    encoding = positions if arguments.fourier_encode_data else None
    return {"data": ArrayInput(arguments.input_shape, channels, positions=encoding, masked=arguments.masked)}


def _encoder(arguments: Arguments, cross: AttentionConfig) -> EncoderConfig:
    width = arguments.latent_heads * arguments.latent_dim_head
    repeated, tied = isinstance(arguments, Perceiver), arguments.weight_tie_layers
    sharing: Literal["none", "all", "all-but-first"] = "none" if not tied else "all-but-first" if repeated else "all"
    return EncoderConfig(
        num_latents=arguments.num_latents,
        num_latent_channels=arguments.latent_dim,
        num_blocks=arguments.depth,
        num_self_attentions_per_block=arguments.self_per_cross_attn if isinstance(arguments, Perceiver) else 1,
        cross_attention=cross,
        self_attention=AttentionConfig(arguments.latent_heads, width, width, _WIDENING, qkv_bias=False),
        num_cross_attentions=arguments.depth if repeated else 1,
        cross_attention_sharing=sharing if repeated else "all",
        block_sharing=sharing,
    )


def _decoder(arguments: PerceiverIO, cross: AttentionConfig, num_queries: int) -> QueryDecoder:
    queries: LearnedQueries | GivenQueries
    if arguments.num_queries is not None:
        queries = GivenQueries(arguments.num_queries, arguments.queries_dim)
    else:
        queries = LearnedQueries(num_queries, arguments.queries_dim)
    width = arguments.logits_dim or arguments.queries_dim
    return QueryDecoder(
        outputs={arguments.output: OutputConfig(queries, (queries.num_queries, width))},
        num_query_channels=arguments.queries_dim,
        cross_attention=msgspec.structs.replace(cross, query_residual=False),
        num_output_channels=arguments.logits_dim or 0,
        mlp=arguments.decoder_ff,
    )
