# SPDX-License-Identifier: Apache-2.0
"""The graphs of a bundle: the whole model, or an encoder and a decoder for each output, with latents in between."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from perceiver_export.exporter.batch import Batch
from perceiver_export.exporter.perceiver.config import (
    ArrayInput,
    FramePairInput,
    GivenQueries,
    ImageInput,
    InputQueries,
    LearnedQueries,
    MaskedInput,
    OutputConfig,
    PerceiverConfig,
    QueryDecoder,
    TokenInput,
)
from perceiver_export.exporter.perceiver.decoder import AverageHead
from perceiver_export.exporter.perceiver.model import PerceiverIO
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.manifest import TensorSpec

# Queries a call of a decoder where nothing else is asked for: few where a text's masked bytes are read, many of a grid.
_LEARNED_QUERIES, _GRID_QUERIES = 256, 8192


@dataclass(frozen=True)
class GraphPart:
    """One graph: a module that takes and gives tensors in the order of ``inputs`` and ``outputs``.

    ``typical`` is the usual size of each dynamic dimension; ``num_queries``: of how many queries a decoder takes some,
    None where it has no such input.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    typical: dict[str, int]
    num_queries: int | None = None


def whole_model(model: PerceiverIO, batch: Batch) -> GraphPart:
    """The model in one graph."""
    inputs, outputs = input_specs(model.config, batch), output_specs(model.config, batch)
    return GraphPart("model", _Whole(model, inputs, outputs), inputs, outputs, _typical(batch))


def split_model(
    model: PerceiverIO, batch: Batch, dynamic_queries: bool = False, queries: int | None = None
) -> tuple[GraphPart, ...]:
    """Encoder first, then `decoder`, or `decoder_NAME` for each of several outputs.

    A decoder takes ``queries`` indices a call (by default 8192 of a grid, 256 of a text), or with
    ``dynamic_queries`` any number up to that (by default: up to all).
    """
    config = model.config
    latents = _spec(
        "latents", (config.encoder.num_latents, config.encoder.num_latent_channels), batch, "what the encoder has read"
    )
    inputs = tuple(spec for spec in input_specs(config, batch) if not _is_given_query(config, spec.name))
    encoder = GraphPart("encoder", _Encoder(model, inputs), inputs, (latents,), _typical(batch))
    if not isinstance(config.decoder, QueryDecoder):
        outputs = output_specs(config, batch)
        return encoder, GraphPart("decoder", _AverageDecoder(model), (latents,), outputs, _typical(batch))
    several = len(config.decoder.outputs) > 1
    return encoder, *(
        _decoder(model, name, f"decoder_{name}" if several else "decoder", latents, batch, queries, dynamic_queries)
        for name in config.decoder.outputs
    )


def _decoder(
    model: PerceiverIO,
    name: str,
    part: str,
    latents: TensorSpec,
    batch: Batch,
    queries: int | None,
    dynamic: bool,
) -> GraphPart:
    assert isinstance(model.config.decoder, QueryDecoder)
    output = model.config.decoder.outputs[name]
    total = output.queries.num_queries
    needed = set(model.config.inputs) if isinstance(output.queries, InputQueries) else {f"{name}_queries"}
    given = [spec for spec in input_specs(model.config, batch) if spec.name in needed]
    if isinstance(output.queries, GivenQueries) or total == 1:
        inputs = [latents, *given]
        spec = next(spec for spec in output_specs(model.config, batch) if spec.name == name)
        return GraphPart(part, _Decoder(model, name, inputs, output.shape), tuple(inputs), (spec,), _typical(batch))
    most = most_queries(output, queries, dynamic)
    dynamic = dynamic and most > 1  # torch knows no range from 1 to 1
    size: int | str = "queries" if dynamic else most
    ranges = {**latents.ranges, **({"queries": (1, most)} if dynamic else {})}
    meaning = f"which of {total} queries to decode, counted from 0"
    inputs = [latents, TensorSpec("queries", "int32", (latents.shape[0], size), meaning, ranges), *given]
    channels = math.prod(output.shape) // total
    rows = TensorSpec(name, "float32", (latents.shape[0], size, channels), "one row a query", ranges)
    typical = _typical(batch) | ({"queries": min(most, _LEARNED_QUERIES)} if dynamic else {})
    return GraphPart(part, _Decoder(model, name, inputs, None), tuple(inputs), (rows,), typical, total)


def most_queries(output: OutputConfig, queries: int | None, dynamic: bool) -> int:
    """How many queries of an output a split decoder takes in a call, at most."""
    total = output.queries.num_queries
    usual = total if dynamic else _LEARNED_QUERIES if isinstance(output.queries, LearnedQueries) else _GRID_QUERIES
    return min(queries or usual, total)


def planned_queries(config: PerceiverConfig, queries: int | None, dynamic: bool) -> dict[str, int]:
    """For how many queries of each output a split decoder is planned: of any number, for those of a usual call."""
    if not isinstance(config.decoder, QueryDecoder):
        return {}
    most = {name: most_queries(output, queries, dynamic) for name, output in config.decoder.outputs.items()}
    return {name: min(count, queries or _GRID_QUERIES) if dynamic else count for name, count in most.items()}


def input_specs(config: PerceiverConfig, batch: Batch) -> tuple[TensorSpec, ...]:
    """What the model takes, masks and given queries included."""
    specs: list[TensorSpec] = []
    shape: tuple[int, ...]
    for name, one in config.inputs.items():
        if isinstance(one, ImageInput):
            shape = (one.num_channels, one.height, one.width)
            specs.append(_spec(name, shape, batch, "preprocessed pictures, channels first"))
        elif isinstance(one, FramePairInput):
            specs.append(_spec(name, (2, 3, one.height, one.width), batch, "two frames in [-1, 1], channels first"))
        elif isinstance(one, TokenInput):
            specs.append(_spec(name, (one.length,), batch, "tokens, padded with 0", "int32"))
            specs.append(_spec(f"{name}_mask", (one.length,), batch, "1 where there is a token, else 0", "int32"))
        elif isinstance(one, ArrayInput):
            specs.append(_spec(name, (*one.shape, one.num_channels), batch, "values, channels last"))
            if one.masked:
                meaning = "1 where there is an element, else 0"
                specs.append(_spec(f"{name}_mask", (math.prod(one.grid),), batch, meaning, "int32"))
        else:
            assert isinstance(one, MaskedInput)
    if isinstance(config.decoder, QueryDecoder):
        for name, output in config.decoder.outputs.items():
            if isinstance(output.queries, GivenQueries):
                shape = (output.queries.num_queries, output.queries.num_channels)
                specs.append(_spec(f"{name}_queries", shape, batch, "one row a query"))
    return tuple(specs)


def output_specs(config: PerceiverConfig, batch: Batch) -> tuple[TensorSpec, ...]:
    """What the model gives."""
    taken = {spec.name for spec in input_specs(config, batch)}
    for name in config.decoder.outputs if isinstance(config.decoder, QueryDecoder) else (config.decoder.output,):
        if name in taken:
            raise UsageError(f"an output is called {name!r}, as an input is", "give it another name")
    if not isinstance(config.decoder, QueryDecoder):
        shape = (config.decoder.num_output_channels,)
        return (_spec(config.decoder.output, shape, batch, "one score a label, before softmax"),)
    return tuple(
        _spec(name, output.shape, batch, _MEANINGS.get(name, "")) for name, output in config.decoder.outputs.items()
    )


_MEANINGS = {
    "logits": "scores, before softmax",
    "flow": "displacement (x, y) of each pixel, in pixels",
    "video": "frames in [0, 1], channels last",
    "sound": "audio in [-1, 1]",
    "label": "one score a label, before softmax",
}


def _spec(name: str, shape: tuple[int, ...], batch: Batch, meaning: str, dtype: str = "float32") -> TensorSpec:
    size: int | str = "batch" if batch.dynamic else batch.typical
    ranges = {"batch": (batch.least, batch.most)} if batch.dynamic else {}
    return TensorSpec(name, "int32" if dtype == "int32" else "float32", (size, *shape), meaning, ranges)


def _typical(batch: Batch) -> dict[str, int]:
    return {"batch": batch.typical} if batch.dynamic else {}


def _is_given_query(config: PerceiverConfig, name: str) -> bool:
    return name not in config.inputs and name.removesuffix("_mask") not in config.inputs


class _Whole(nn.Module):
    def __init__(self, model: PerceiverIO, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        super().__init__()
        self.model = model
        self.takes, self.gives = [spec.name for spec in inputs], [spec.name for spec in outputs]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(dict(zip(self.takes, tensors, strict=True)))
        return tuple(outputs[name] for name in self.gives)


class _Encoder(nn.Module):
    def __init__(self, model: PerceiverIO, inputs: tuple[TensorSpec, ...]) -> None:
        super().__init__()
        self.model = model
        self.takes = [spec.name for spec in inputs]

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        return (self.model.encode(dict(zip(self.takes, tensors, strict=True))),)


class _Decoder(nn.Module):
    """``shape`` of the output where all queries are decoded; None gives rows."""

    def __init__(self, model: PerceiverIO, name: str, inputs: list[TensorSpec], shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.model, self.output, self.shape = model, name, shape
        self.takes = [spec.name for spec in inputs]

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        feeds = dict(zip(self.takes, tensors, strict=True))
        latents, indices = feeds.pop("latents"), feeds.pop("queries", None)
        rows = self.model.decode(self.output, latents, indices, feeds)
        return (rows if self.shape is None else rows.reshape(rows.shape[0], *self.shape),)


class _AverageDecoder(nn.Module):
    def __init__(self, model: PerceiverIO) -> None:
        super().__init__()
        assert isinstance(model.decoder, AverageHead)
        self.model = nn.ModuleDict({"decoder": model.decoder})

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        (latents,) = tensors
        return (self.model["decoder"](latents),)
