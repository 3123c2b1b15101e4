# SPDX-License-Identifier: Apache-2.0
"""The graphs of one model: the whole model, or an encoder and one decoder per output.

A `PerceiverIO` knows its latents and is split before it is traced: a video's 804,737 queries are never traced at once.
The graph of any other model is cut after tracing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import onnx_ir as ir
from torch import Tensor, nn

from perceiver_export.exporter.fold.latents import (
    INDICES,
    LATENTS,
    QUERIES,
    cut,
    decoder_names,
    gather_rows,
    independent_rows,
    own_outputs,
)
from perceiver_export.exporter.fold.nodes import sizes
from perceiver_export.exporter.fold.slicing import Region
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.model.config import (
    ArrayInput,
    FramePairInput,
    GivenQueries,
    ImageInput,
    InputQueries,
    LearnedQueries,
    OutputConfig,
    PerceiverConfig,
    QueryDecoder,
    TokenInput,
)
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.exporter.onnx_files import OnnxFile
from perceiver_export.exporter.own import NamedModule, check_tensor, repeated
from perceiver_export.runtimes.errors import UnsupportedModelError, UsageError
from perceiver_export.runtimes.manifest import DType, TensorSpec
from perceiver_export.runtimes.runtime import Array

# Default queries per decoder call: a text has few masked bytes, a grid has many points.
_LEARNED_QUERIES, _GRID_QUERIES = 256, 8192
_MEANINGS = {
    "logits": "one number per choice",
    "flow": "displacement (x, y) of each pixel, in pixels",
    "video": "frames in [0, 1], channels last",
    "sound": "audio in [-1, 1]",
    "label": "one number per label",
}


@dataclass(frozen=True)
class Batch:
    """Samples per call: one number, or from ``least`` to ``most`` with ``typical`` in between."""

    least: int
    typical: int
    most: int

    @classmethod
    def parse(cls, text: str | int) -> Batch:
        """Parse ``4`` or ``1:4:16``. Raises UsageError."""
        words = str(text).split(":")
        numbers = [int(word) for word in (words * 3 if len(words) == 1 else words) if word.isdecimal()]
        if len(words) not in (1, 3) or len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            raise UsageError(
                f"batch {text!r} is neither a positive number nor a rising range",
                "give a number, or MIN:OPT:MAX such as 1:4:16",
            )
        return cls(*numbers)

    @property
    def dimension(self) -> int | str:
        """The first dimension of every tensor: `batch`, or a fixed number of samples."""
        return "batch" if self.ranges else self.typical

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """(least, most) by name of the dimension; empty if it is fixed."""
        return {"batch": (self.least, self.most)} if self.least != self.most else {}

    @property
    def sizes(self) -> dict[str, int]:
        """The typical size by name of the dimension; empty if it is fixed."""
        return {"batch": self.typical} if self.ranges else {}


@dataclass(frozen=True)
class Split:
    """Where to split a model: at the tensor, or at the end of the module, named ``latents`` (None: find the latents).

    ``queries``: how many a decoder takes per call (None: the default); with ``dynamic``, any number up to that.
    """

    latents: str | None = None
    queries: int | None = None
    dynamic: bool = False

    def check(self, graphs: Sequence[GraphPart], why: str = "") -> None:
        """Raise UsageError if queries were asked for but no decoder takes query indices."""
        if (self.dynamic or self.queries) and all(graph.num_queries is None for graph in graphs):
            raise UsageError(
                f"no decoder of this model can decode a subset of its queries{why}",
                "leave out --dynamic-queries and --shape queries=…",
            )


@dataclass(frozen=True)
class GraphPart:
    """One graph, and the module or ONNX file that it comes from. A part that is cut from it keeps the whole module.

    ``inputs`` and ``outputs`` are in the module's order. ``typical`` is the usual size of each dynamic dimension.
    ``num_queries`` is the number of queries that a decoder's indices choose from, None if it takes no indices.
    ``examples``: inputs that random inputs resemble.
    """

    name: str
    module: Any  # nn.Module or OnnxFile
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    typical: dict[str, int]
    num_queries: int | None = None
    examples: Mapping[str, Array] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """(least, most) of each dynamic dimension."""
        return {name: limits for spec in self.inputs for name, limits in spec.ranges.items()}

    def planned(self, name: str) -> int:
        """The size that memory is planned for: the largest of the dimension, for queries at most `_GRID_QUERIES`."""
        most = self.ranges[name][1]
        return min(most, _GRID_QUERIES) if name == "queries" else most

    @property
    def samples(self) -> int:
        """The largest number of samples per call."""
        first = (self.inputs[0].shape or (1,))[0]
        return self.planned(first) if isinstance(first, str) else first


# A model and its inputs by name -> its outputs in order.
Compute = Callable[[Any, dict[str, Tensor]], Sequence[Tensor]]


class ByPosition(nn.Module):
    """``compute`` as a module that takes tensors by position; its weights are named ``model.…``."""

    def __init__(self, model: nn.Module, inputs: Sequence[TensorSpec], compute: Compute) -> None:
        super().__init__()
        self.model, self.names, self.compute = model, [spec.name for spec in inputs], compute

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.compute(self.model, dict(zip(self.names, tensors, strict=True))))


def make_graphs(loaded: LoadedModel, batch: Batch | None, split: Split | None) -> tuple[GraphPart, ...]:
    """The graphs to trace. Your own module or an ONNX file is one graph, which is cut later.

    Raises UsageError if ``split`` does not fit the model.
    """
    if loaded.config is None:
        return (own_graph(loaded.model, batch),)
    batch = batch or Batch.parse(1)
    if split is None:
        return (whole_model(loaded.model, batch),)
    if split.latents is not None:
        raise UsageError("the latents of this model are known", "leave --latents out")
    graphs = split_model(loaded.model, batch, split)
    split.check(graphs)
    return graphs


def own_graph(model: NamedModule | OnnxFile, batch: Batch | None) -> GraphPart:
    """Any module or ONNX file in one graph. Without ``batch`` it takes as many samples as its examples have.

    The batch must be the first dimension of every input and output.

    Raises UnsupportedModelError if it is not, or if bundles do not support the type of a tensor; UsageError if the
    ONNX file has another, fixed batch.
    """
    examples = model.examples
    if not examples:
        raise UnsupportedModelError("the model has no inputs", "export a model with at least one input")
    for name, array in examples.items():
        check_tensor(name, array)
    samples = next((len(array) for array in examples.values() if array.ndim), 0)
    taken = batch or Batch(samples, samples, samples)
    other = {name for name, array in examples.items() if array.shape[:1] != (samples,)}
    sized = {name: array if name in other else repeated(array, taken.typical) for name, array in examples.items()}
    fixed = model.samples if isinstance(model, OnnxFile) and not other else None
    if fixed is not None and {taken.least, taken.most} != {fixed}:
        raise UsageError(
            f"the file takes {fixed} sample{'s' * (fixed > 1)} per call",
            "leave --batch out, or export the file again with a dynamic batch",
        )
    found = model.run(sized)
    other |= {name for name, array in found.items() if not samples or array.shape[:1] != (taken.typical,)}
    if other:
        raise UnsupportedModelError(
            f"the batch is not the first dimension of {', '.join(sorted(other))}",
            "wrap the model in a module that moves it there",
        )

    def spec(name: str, array: Array) -> TensorSpec:
        check_tensor(name, array)
        return TensorSpec(name, cast(DType, str(array.dtype)), (taken.dimension, *array.shape[1:]), "", taken.ranges)

    inputs, outputs = (tuple(itertools.starmap(spec, arrays.items())) for arrays in (sized, found))
    return GraphPart("model", model, inputs, outputs, taken.sizes, examples=examples)


def whole_model(model: PerceiverIO, batch: Batch) -> GraphPart:
    """The model in one graph."""
    inputs, outputs = input_specs(model.config, batch), output_specs(model.config, batch)
    names = [spec.name for spec in outputs]

    def compute(model: Any, feeds: dict[str, Tensor]) -> list[Tensor]:
        found = model(feeds)
        return [found[name] for name in names]

    return GraphPart("model", ByPosition(model, inputs, compute), inputs, outputs, batch.sizes)


def cut_parts(
    source: GraphPart, model: ir.Model, latents: ir.Value, split: Split, stand_in: int | None
) -> list[tuple[GraphPart, ir.Model]]:
    """Cut a graph at ``latents`` into the encoder and the decoders.

    ``stand_in`` replaces a dynamic number of queries. Raises UsageError if the model uses a name that the parts need,
    or if ``split`` asks for queries and the rows of no decoder are independent.
    """
    given = {spec.name: spec for spec in (*source.inputs, *source.outputs)}
    integers = {name for name, spec in given.items() if spec.dtype == "int32"}
    for name in sorted(given.keys() & {LATENTS, INDICES} | integers & {QUERIES}):
        raise UsageError(f"the model has a tensor {name!r}, a name that split bundles reserve", "rename it")
    ranges = {name: limits for name, limits in source.ranges.items() if name == "batch"}
    shape = (source.outputs[0].shape[0], *sizes(latents)[1:])
    between = TensorSpec(LATENTS, "float32", shape, "the output of the encoder", ranges)
    own_outputs(model.graph, [spec.name for spec in source.outputs])
    encoder, decoders = cut(model, latents)
    inputs = tuple(given[str(value.name)] for value in encoder.graph.inputs)
    parts = [(dataclasses.replace(source, name="encoder", inputs=inputs, outputs=(between,)), encoder)]
    names, reasons = decoder_names(decoders), []
    for name, decoder in decoders.items():
        read = tuple(given[str(value.name)] for value in decoder.graph.inputs[1:])
        graph = dataclasses.replace(source, name=names[name], inputs=(between, *read), outputs=(given[name],))
        region = independent_rows(decoder.graph, sizes(latents)[0])
        if isinstance(region, str):
            reasons.append(f"for {name}, {region}")
        else:
            queries = _choice(split, sizes(region.results[0])[1], _GRID_QUERIES, between, samples=1)
            if QUERIES in given:
                queries = msgspec.structs.replace(queries, name=INDICES)
            graph = _by_rows(graph, decoder, region, queries, stand_in)
        parts.append((graph, decoder))
    split.check([part for part, _ in parts], ": " + "; ".join(reasons))
    return parts


def _by_rows(graph: GraphPart, model: ir.Model, region: Region, queries: TensorSpec, stand_in: int | None) -> GraphPart:
    """Make a decoder take query indices; its graph is changed in place."""
    (result,), (latents, *others), (output,) = region.results, graph.inputs, graph.outputs
    size = queries.shape[1]
    step = size if isinstance(size, int) else stand_in
    assert step is not None
    shape = (latents.shape[0], size, *gather_rows(model, region, queries.name, step)[2:])
    ranges = {**output.ranges, **queries.ranges}
    rows = msgspec.structs.replace(output, shape=shape, meaning="one row per query", ranges=ranges)
    typical, count = {**graph.typical, **_usual(queries)}, sizes(result)[1]
    inputs = (latents, queries, *others)
    return dataclasses.replace(graph, inputs=inputs, outputs=(rows,), typical=typical, num_queries=count)


def _choice(split: Split, total: int, usual: int, latents: TensorSpec, samples: int | str) -> TensorSpec:
    """A decoder's input of query indices, for each of ``samples``."""
    most = min(split.queries or (total if split.dynamic else usual), total)
    dynamic = split.dynamic and most > 1  # torch accepts no range from 1 to 1
    ranges = {**({} if samples == 1 else latents.ranges), **({"queries": (1, most)} if dynamic else {})}
    meaning = f"which of {total} queries to decode, counted from 0"
    return TensorSpec(QUERIES, "int32", (samples, QUERIES if dynamic else most), meaning, ranges, (0, total - 1))


def _usual(queries: TensorSpec) -> dict[str, int]:
    """The typical size by name of the dimension; empty if it is fixed."""
    return {name: min(most, _LEARNED_QUERIES) for name, (_, most) in queries.ranges.items() if name == QUERIES}


def split_model(model: PerceiverIO, batch: Batch, split: Split = Split()) -> tuple[GraphPart, ...]:
    """The encoder, then `decoder`, or `decoder_NAME` for each of several outputs.

    A decoder takes ``split.queries`` indices per call (by default 8192 of a grid, 256 of a text); with ``dynamic``, any
    number up to that (by default up to all).
    """
    config = model.config
    size = (config.encoder.num_latents, config.encoder.num_latent_channels)
    latents = _spec("latents", size, batch, "the output of the encoder")
    given = {f"{name}_queries" for name, one in _outputs(config).items() if isinstance(one.queries, GivenQueries)}
    inputs = tuple(spec for spec in input_specs(config, batch) if spec.name not in given)
    module = ByPosition(model, inputs, lambda model, feeds: [model.encode(feeds)])
    encoder = GraphPart("encoder", module, inputs, (latents,), batch.sizes)
    if not isinstance(config.decoder, QueryDecoder):
        head = ByPosition(model, [latents], lambda model, feeds: [model.decoder(feeds["latents"])])
        return encoder, GraphPart("decoder", head, (latents,), output_specs(config, batch), batch.sizes)
    return encoder, *(_decoder(model, name, latents, batch, split) for name in config.decoder.outputs)


def _decoder(model: PerceiverIO, name: str, latents: TensorSpec, batch: Batch, split: Split) -> GraphPart:
    outputs = _outputs(model.config)
    output, total = outputs[name], outputs[name].queries.num_queries
    needed = set(model.config.inputs) if isinstance(output.queries, InputQueries) else {f"{name}_queries"}
    given = [spec for spec in input_specs(model.config, batch) if spec.name in needed]
    typical, choice = batch.sizes, []
    chosen = total > 1 and not isinstance(output.queries, GivenQueries)
    (result,) = (spec for spec in output_specs(model.config, batch) if spec.name == name)
    if chosen:
        usual = _LEARNED_QUERIES if isinstance(output.queries, LearnedQueries) else _GRID_QUERIES
        choice = [_choice(split, total, usual, latents, latents.shape[0])]
        typical |= _usual(choice[0])
        shape = (*choice[0].shape, math.prod(output.shape) // total)
        result = TensorSpec(name, "float32", shape, "one row per query", choice[0].ranges)

    def compute(model: Any, feeds: dict[str, Tensor]) -> list[Tensor]:
        rows = model.decode(name, feeds.pop("latents"), feeds.pop("queries", None), feeds)
        return [rows if chosen else rows.reshape(rows.shape[0], *output.shape)]

    inputs, part = (latents, *choice, *given), decoder_names(outputs)[name]
    return GraphPart(part, ByPosition(model, inputs, compute), inputs, (result,), typical, total if chosen else None)


def _outputs(config: PerceiverConfig) -> dict[str, OutputConfig]:
    return dict(config.decoder.outputs) if isinstance(config.decoder, QueryDecoder) else {}


def input_specs(config: PerceiverConfig, batch: Batch) -> tuple[TensorSpec, ...]:
    """The inputs of the whole model, with masks and given queries."""
    specs: list[TensorSpec] = []
    for name, one in config.inputs.items():
        if isinstance(one, ImageInput):
            shape = (one.num_channels, one.height, one.width)
            specs.append(_spec(name, shape, batch, "preprocessed RGB images, channels first"))
        elif isinstance(one, FramePairInput):
            specs.append(_spec(name, (2, 3, one.height, one.width), batch, "two RGB frames in [-1, 1], channels first"))
        elif isinstance(one, TokenInput):
            specs.append(_spec(name, (one.length,), batch, "tokens, padded with 0", (0, one.vocabulary_size - 1)))
        elif isinstance(one, ArrayInput):
            specs.append(_spec(name, (*one.shape, one.num_channels), batch, "values, channels last"))
        if isinstance(one, TokenInput) or (isinstance(one, ArrayInput) and one.masked):
            there = "a token" if isinstance(one, TokenInput) else "an element"
            specs.append(_spec(f"{name}_mask", (one.num_inputs,), batch, f"1 where there is {there}, else 0", (0, 1)))
    for name, output in _outputs(config).items():
        if isinstance(output.queries, GivenQueries):
            rows = (output.queries.num_queries, output.queries.num_channels)
            specs.append(_spec(f"{name}_queries", rows, batch, "one row per query"))
    return tuple(specs)


def output_specs(config: PerceiverConfig, batch: Batch) -> tuple[TensorSpec, ...]:
    """The outputs of the whole model. Raises UsageError if an output has the name of an input."""
    shapes = {name: output.shape for name, output in _outputs(config).items()}
    meanings = _MEANINGS
    if not isinstance(config.decoder, QueryDecoder):
        shapes = {config.decoder.output: (config.decoder.num_output_channels,)}
        meanings = {config.decoder.output: "one number per label"}
    for spec in input_specs(config, batch):
        if spec.name in shapes:
            raise UsageError(f"{spec.name!r} names an input and an output", "give one of them another name")
    return tuple(_spec(name, shape, batch, meanings.get(name, "")) for name, shape in shapes.items())


def _spec(
    name: str, shape: tuple[int, ...], batch: Batch, meaning: str, values: tuple[int, int] | None = None
) -> TensorSpec:
    """A tensor with the batch in front: int32 if ``values`` gives its range, else float32."""
    dtype: DType = "float32" if values is None else "int32"
    return TensorSpec(name, dtype, (batch.dimension, *shape), meaning, batch.ranges, values)
