# SPDX-License-Identifier: Apache-2.0
"""Perceiver and Perceiver IO, cut where export cuts them: inputs -> encoder -> latents -> decoder -> outputs.

Source: Perceiver IO (arXiv 2107.14795), figure 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from perceiver_export.exporter.perceiver.adapters import TokenAdapter, input_adapter
from perceiver_export.exporter.perceiver.checks import check_config
from perceiver_export.exporter.perceiver.config import (
    GivenQueries,
    InputQueries,
    MaskedInput,
    PerceiverConfig,
    QueryDecoder,
    TokenInput,
)
from perceiver_export.exporter.perceiver.decoder import AverageHead, PerceiverDecoder, input_queries
from perceiver_export.exporter.perceiver.encoder import PerceiverEncoder


class PerceiverIO(nn.Module):
    """Arrays by input name -> arrays by output name; what they are is all in the config.

    Raises UsageError: a config whose sizes contradict each other.
    """

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.inputs = nn.ModuleDict({name: input_adapter(one) for name, one in config.inputs.items()})
        self.input_paddings = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(1, config.num_input_channels - one.num_input_channels) * 0.02)
                for name, one in config.inputs.items()
                if one.num_input_channels < config.num_input_channels
            }
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
        """All outputs, each (B, *shape). Masks may be left out: then all is there."""
        inputs, mask = self.embed(feeds)
        latents = self.encoder(inputs, mask)
        if isinstance(self.decoder, AverageHead):
            assert not isinstance(self.config.decoder, QueryDecoder)
            return {self.config.decoder.output: self.decoder(latents)}
        assert isinstance(self.config.decoder, QueryDecoder)
        outputs = {}
        for name, output in self.config.decoder.outputs.items():
            rows = self.decode(name, latents, None, feeds, inputs, mask)
            outputs[name] = rows.reshape(rows.shape[0], *output.shape)
        return outputs

    def encode(self, feeds: Mapping[str, Tensor]) -> Tensor:
        """Latents (B, N, D) that have read the inputs."""
        latents: Tensor = self.encoder(*self.embed(feeds))
        return latents

    def embed(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """All inputs side by side (B, M, C), and which are there (B, M), None where all are."""
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

        ``inputs`` are what `embed` gave, where the caller has that already; ``mask`` leaves out the queries of inputs
        that are not there, where the config asks for that.
        """
        config = self.config.decoder
        assert isinstance(config, QueryDecoder)
        embedding = None
        if config.tied_to is not None:
            adapter = self.inputs[config.tied_to]
            assert isinstance(adapter, TokenAdapter)
            embedding = adapter.embedding.weight
        queries = self.queries_of(name, indices, feeds, inputs)
        rows: Tensor = self.decoder(latents, name, queries, self.query_mask(indices, mask), embedding)
        scale = config.outputs[name].scale
        return rows if scale == 1 else rows * scale

    def queries_of(
        self, name: str, indices: Tensor | None, feeds: Mapping[str, Tensor], inputs: Tensor | None
    ) -> Tensor:
        """Queries (1 or B, Q, F) of one output, before they are padded."""
        config = self.config.decoder
        assert isinstance(config, QueryDecoder)
        queries = config.outputs[name].queries
        if isinstance(queries, GivenQueries):
            return feeds[f"{name}_queries"]
        if isinstance(queries, InputQueries):
            return input_queries(self.embed(feeds)[0] if inputs is None else inputs, indices)
        tables = self.decoder.queries
        assert isinstance(tables, nn.ModuleDict)
        chosen: Tensor = tables[name](indices)
        return chosen

    def query_mask(self, indices: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Which queries are there (B, O), where the config leaves those out that are not."""
        return mask if self.config.mask_queries and indices is None else None


def joined_mask(masks: Sequence[Tensor | None], sizes: Sequence[int], batch: int) -> Tensor | None:
    """The masks of all inputs side by side (B, M), ones where an input has none; None where none has."""
    if all(mask is None for mask in masks):
        return None
    there = [
        torch.ones(batch, size, dtype=torch.int32) if mask is None else mask
        for mask, size in zip(masks, sizes, strict=True)
    ]
    return torch.cat(there, dim=1) if len(there) > 1 else there[0]
