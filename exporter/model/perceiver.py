# SPDX-License-Identifier: Apache-2.0
"""Perceiver and Perceiver IO in PyTorch: inputs -> encoder -> latents -> decoder -> outputs.

In the encoder, latents read the inputs, then each other. In the decoder, queries read the latents. The first Perceiver
averages the latents instead, and reads its inputs more than once.

Source: Perceiver IO (arXiv 2107.14795), figure 2, sections 3.1 and 3.2; Perceiver (arXiv 2103.03206), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import torch
from torch import Tensor, nn

from perceiver_export.exporter.model.attention import CrossAttention, SelfAttention, by_rows
from perceiver_export.exporter.model.checks import require
from perceiver_export.exporter.model.config import (
    Activation,
    AverageDecoder,
    EncoderConfig,
    GivenQueries,
    InputQueries,
    LearnedQueries,
    MaskedInput,
    MaskedRows,
    PerceiverConfig,
    PositionQueries,
    QueryDecoder,
    Sharing,
    TokenInput,
)
from perceiver_export.exporter.model.inputs import fourier_table, input_adapter


class PerceiverEncoder(nn.Module):
    """Inputs (B, M, C) and their mask (B, M) -> latents (B, N, D)."""

    def __init__(
        self, config: EncoderConfig, num_input_channels: int, activation: Activation, masked_rows: MaskedRows = "mean"
    ) -> None:
        super().__init__()
        self.config = config
        num_channels, num_layers = config.num_latent_channels, config.num_self_attentions_per_block
        self.latents = nn.Parameter(torch.randn(config.num_latents, num_channels) * 0.02)
        self.cross_attentions = nn.ModuleList(
            CrossAttention(config.cross_attention, num_channels, num_input_channels, activation, masked_rows)
            for _ in range(_distinct(config.num_cross_attentions, config.cross_attention_sharing))
        )
        self.self_attentions = nn.ModuleList(
            nn.ModuleList(SelfAttention(config.self_attention, num_channels, activation) for _ in range(num_layers))
            for _ in range(_distinct(config.num_blocks, config.block_sharing))
        )

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        latents = self.latents.unsqueeze(0)
        for index in range(self.config.num_blocks):
            if index < self.config.num_cross_attentions:
                read = self.cross_attentions[layer_index(index, self.config.cross_attention_sharing)]
                latents = read(latents, inputs, mask)
            block = self.self_attentions[layer_index(index, self.config.block_sharing)]
            assert isinstance(block, nn.ModuleList)
            for layer in block:
                latents = layer(latents)
        return latents


def _distinct(count: int, sharing: Sharing) -> int:
    """The number of distinct sets of weights in ``count`` layers."""
    return {"all": 1, "all-but-first": min(count, 2), "none": count}[sharing]


def layer_index(index: int, sharing: Sharing) -> int:
    """The set of weights that layer ``index`` uses."""
    return {"all": 0, "all-but-first": min(index, 1), "none": index}[sharing]


class LearnedQueryTable(nn.Module):
    """Trained queries: all of them (1, O, F), or those of ``indices`` (B, Q) -> (B, Q, F)."""

    def __init__(self, config: LearnedQueries) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(config.num_queries, config.num_channels) * 0.02)

    def forward(self, indices: Tensor | None) -> Tensor:
        return self.table.unsqueeze(0) if indices is None else nn.functional.embedding(indices, self.table)


class PositionQueryTable(nn.Module):
    """Fourier features of grid points: all (1, O, F), or those of flat ``indices`` (B, Q) -> (B, Q, F).

    Fourier features are separable: one small table per axis replaces a row for each of a video's 800,000 points.
    """

    def __init__(self, config: PositionQueries) -> None:
        super().__init__()
        self.shape, self.num_bands = config.shape, config.positions.num_bands
        for axis, size in enumerate(config.shape):
            resolution = (config.positions.max_resolution[axis],)
            one_axis = msgspec.structs.replace(config.positions, max_resolution=resolution)
            self.register_buffer(f"axis_{axis}", fourier_table(one_axis, (size,)), persistent=False)

    def forward(self, indices: Tensor | None) -> Tensor:
        if indices is None:
            device = self.get_buffer("axis_0").device
            indices = torch.arange(math.prod(self.shape), device=device).unsqueeze(0)
        rows, stride = [], math.prod(self.shape)
        for axis, size in enumerate(self.shape):
            stride //= size
            points = torch.remainder(torch.div(indices, stride, rounding_mode="floor"), size)
            rows.append(nn.functional.embedding(points, self.get_buffer(f"axis_{axis}")))
        k = self.num_bands
        columns = (slice(0, 1), slice(1, 1 + k), slice(1 + k, None))  # positions, sines, cosines
        return torch.cat([row[..., column] for column in columns for row in rows], dim=-1)


def input_queries(inputs: Tensor, indices: Tensor | None) -> Tensor:
    """The inputs themselves (B, M, C), or their rows at ``indices`` (B, Q) -> (B, Q, C)."""
    if indices is None:
        return inputs
    if inputs.shape[0] == 1:
        return nn.functional.embedding(indices, inputs[0])
    return inputs.gather(1, indices.long().unsqueeze(-1).expand(-1, -1, inputs.shape[-1]))


class PerceiverDecoder(nn.Module):
    """Queries (1 or B, O, F) read latents (B, N, D) -> output rows (B, O, E) of one of the outputs."""

    def __init__(
        self, config: QueryDecoder, num_latent_channels: int, activation: Activation, vocabulary_size: int | None
    ) -> None:
        super().__init__()
        width = config.num_query_channels
        self.queries = nn.ModuleDict()
        self.paddings = nn.ParameterDict()
        self.heads = nn.ModuleDict()
        for name, output in config.outputs.items():
            if isinstance(output.queries, LearnedQueries):
                self.queries[name] = LearnedQueryTable(output.queries)
            if isinstance(output.queries, PositionQueries):
                self.queries[name] = PositionQueryTable(output.queries)
            if output.queries.num_channels < width:
                self.paddings[name] = nn.Parameter(torch.randn(1, width - output.queries.num_channels) * 0.02)
            if output.num_channels:
                self.heads[name] = nn.Linear(config.num_output_channels or width, output.num_channels)
        self.cross_attention = CrossAttention(config.cross_attention, width, num_latent_channels, activation)
        self.output = nn.Linear(width, config.num_output_channels) if config.num_output_channels else nn.Identity()
        self.embedding_bias = nn.Parameter(torch.zeros(vocabulary_size)) if vocabulary_size is not None else None

    def forward(
        self, latents: Tensor, name: str, queries: Tensor, query_mask: Tensor | None, embedding: Tensor | None
    ) -> Tensor:
        if name in self.paddings:
            padding = self.paddings[name].expand(*queries.shape[:-1], -1)
            queries = torch.cat([queries, padding], dim=-1)
        rows: Tensor = self.output(self.cross_attention(queries, latents, query_mask=query_mask))
        if name in self.heads:
            rows = self.heads[name](rows)
        if embedding is not None and self.embedding_bias is not None:
            rows = torch.matmul(rows, embedding.T) + self.embedding_bias
        return rows


class AverageHead(nn.Module):
    """Latents (B, N, D) -> outputs (B, E): mean over the latents, then a linear layer."""

    def __init__(self, config: AverageDecoder, num_latent_channels: int) -> None:
        super().__init__()
        self.output = nn.Linear(num_latent_channels, config.num_output_channels)

    def forward(self, latents: Tensor) -> Tensor:
        outputs: Tensor = self.output(latents.mean(dim=1))
        return outputs


class PerceiverIO(nn.Module):
    """Arrays by input name -> arrays by output name, all described by the config.

    Raises UsageError: an input or output has a name that torch or a bundle uses.
    """

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        for name in (*config.inputs, *_outputs(config.decoder)):
            _check_name(name)
        self.config = config
        self.inputs = nn.ModuleDict({name: input_adapter(one) for name, one in config.inputs.items()})
        missing = {name: config.num_input_channels - one.num_input_channels for name, one in config.inputs.items()}
        self.input_paddings = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(1, width) * 0.02) for name, width in missing.items() if width}
        )
        self.encoder = PerceiverEncoder(
            config.encoder, config.num_input_channels, config.activation, config.masked_rows
        )
        self.decoder: nn.Module
        num_latent_channels = config.encoder.num_latent_channels
        if isinstance(config.decoder, QueryDecoder):
            tied = config.inputs.get(config.decoder.tied_to or "")
            vocabulary_size = tied.vocabulary_size if isinstance(tied, TokenInput) else None
            self.decoder = PerceiverDecoder(config.decoder, num_latent_channels, config.activation, vocabulary_size)
        else:
            self.decoder = AverageHead(config.decoder, num_latent_channels)

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs, each (B, *shape). An input without its mask counts as complete."""
        inputs, mask = self.embed(feeds)
        latents = self.encoder(inputs, mask)
        config = self.config.decoder
        if isinstance(config, AverageDecoder):
            return {config.output: self.decoder(latents)}
        outputs = {}
        for name, output in config.outputs.items():
            rows = self.decode(name, latents, None, feeds, inputs, mask)
            outputs[name] = rows.reshape(rows.shape[0], *output.shape)
        return outputs

    def encode(self, feeds: Mapping[str, Tensor]) -> Tensor:
        """Latents (B, N, D) that have read the inputs."""
        latents: Tensor = self.encoder(*self.embed(feeds))
        return latents

    def embed(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """All inputs side by side (B, M, C), and their mask (B, M), which is None if all are complete."""
        embedded, masks = [], []
        for name, config in self.config.inputs.items():
            adapter = self.inputs[name]
            rows: Tensor = adapter() if isinstance(config, MaskedInput) else adapter(feeds[name])
            if name in self.input_paddings:
                padding = self.input_paddings[name].expand(*rows.shape[:-1], -1)
                rows = torch.cat([rows, padding], dim=-1)
            embedded.append(rows)
            masks.append(feeds.get(f"{name}_mask"))
        if len(embedded) == 1:
            return embedded[0], masks[0]
        batch = next(iter(feeds.values())).shape[0]
        inputs = torch.cat([rows.expand(batch, -1, -1) for rows in embedded], dim=1)
        return inputs, joined_mask(masks, [rows.shape[1] for rows in embedded], batch)

    def decode(
        self,
        name: str,
        latents: Tensor,
        indices: Tensor | None,
        feeds: Mapping[str, Tensor],
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Rows (B, Q, E) of one output for the queries ``indices`` (B, Q), None for all of them.

        ``inputs`` and ``mask`` are the result of `embed`, if the caller has it. With ``mask_queries`` the queries of
        masked inputs read zeros.
        """
        config = self.config.decoder
        assert isinstance(config, QueryDecoder)
        tied = config.tied_to
        embedding = None if tied is None else self.get_parameter(f"inputs.{tied}.embedding.weight")
        kind = config.outputs[name].queries
        if isinstance(kind, GivenQueries):
            queries = feeds[f"{name}_queries"]
        elif isinstance(kind, InputQueries):
            queries = input_queries(self.embed(feeds)[0] if inputs is None else inputs, indices)
        else:
            queries = self.decoder.get_submodule(f"queries.{name}")(indices)
        query_mask = mask if self.config.mask_queries and indices is None else None

        def read(some: Tensor) -> tuple[Tensor]:
            return (self.decoder(latents, name, some, query_mask, embedding),)

        (rows,) = by_rows(read, queries) if query_mask is None else read(queries)
        scale = config.outputs[name].scale
        return rows if scale == 1 else rows * scale


def _outputs(decoder: QueryDecoder | AverageDecoder) -> Iterable[str]:
    return (decoder.output,) if isinstance(decoder, AverageDecoder) else decoder.outputs


def _check_name(name: str) -> None:
    # Modules and parameters get these names in containers that have attributes of their own.
    taken = any(hasattr(keeper, name) for keeper in (nn.ModuleDict(), nn.ParameterDict()))
    taken = taken or name in ("latents", "queries") or name.endswith(("_mask", "_queries"))
    require(name.isidentifier() and not taken, f"{name!r} cannot name an input or output", "choose another name")


def joined_mask(masks: Sequence[Tensor | None], sizes: Sequence[int], batch: int) -> Tensor | None:
    """The masks of all inputs side by side (B, M), ones for an input without a mask; None if no input has one."""
    if all(mask is None for mask in masks):
        return None
    there = [
        torch.ones(batch, size, dtype=torch.int32) if mask is None else mask
        for mask, size in zip(masks, sizes, strict=True)
    ]
    return torch.cat(there, dim=1)
