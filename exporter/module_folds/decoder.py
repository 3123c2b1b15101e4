# SPDX-License-Identifier: Apache-2.0
"""A decoder with its folds: for each output the attention and the tail that cost least."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_export.exporter.model.attention import CrossAttention
from perceiver_export.exporter.model.config import PositionQueries, QueryDecoder
from perceiver_export.exporter.model.inputs import TokenAdapter
from perceiver_export.exporter.model.perceiver import PerceiverDecoder, PerceiverIO
from perceiver_export.exporter.module_folds.many_queries import InputQueriesAttention
from perceiver_export.exporter.module_folds.modalities import position_constants, query_modality
from perceiver_export.exporter.module_folds.position_queries import PositionQueriesAttention
from perceiver_export.exporter.module_folds.sites import Sites
from perceiver_export.exporter.module_folds.tails import Linear, LinearTail, PlainTail


class FoldedDecoder(nn.Module):
    """``sites`` by output: attention and tail; ``plain``: for queries that a fold does not cover, the tail folded."""

    def __init__(self, model: PerceiverIO, reference: PerceiverDecoder, sites: Sites) -> None:
        super().__init__()
        assert isinstance(model.config.decoder, QueryDecoder)
        self.queries, self.paddings = reference.queries, reference.paddings
        self.sites, self.plain = nn.ModuleDict(), nn.ModuleDict()
        attention = reference.cross_attention
        for name, output in model.config.decoder.outputs.items():
            site, kind = sites.outputs[name], LinearTail if sites.outputs[name].linear_tail else PlainTail
            tail = kind(attention, _linear_layers(model, reference, name), output.scale)
            self.plain[name] = PlainAttention(attention, tail)
            if site.folded and isinstance(output.queries, PositionQueries):
                constants = position_constants(reference, name, output.queries)
                self.sites[name] = PositionQueriesAttention(attention, tail, constants, site.at_a_time)
            elif site.folded:
                modality = query_modality(model, reference, name)
                self.sites[name] = InputQueriesAttention(attention, tail, modality, site.at_a_time)
            else:
                self.sites[name] = self.plain[name]

    def padded(self, name: str, queries: Tensor) -> Tensor:
        """Queries of one output (…, O, F), as wide as those of all outputs."""
        if name not in self.paddings:
            return queries
        return torch.cat([queries, self.paddings[name].expand(*queries.shape[:-1], -1)], dim=-1)


class PlainAttention(nn.Module):
    """Queries (1 or B, O, F) and latents (B, N, D) -> output rows (B, O, E)."""

    def __init__(self, reference: CrossAttention, tail: nn.Module) -> None:
        super().__init__()
        self.attention, self.tail = reference, tail

    def forward(self, queries: Tensor, latents: Tensor, query_mask: Tensor | None) -> Tensor:
        rows: Tensor = self.tail(self.attention.read(queries, latents, query_mask=query_mask))
        return rows


def _linear_layers(model: PerceiverIO, reference: PerceiverDecoder, name: str) -> list[Linear]:
    """What follows the decoder's MLP: final layer, head, tied embedding, as far as there are."""
    assert isinstance(model.config.decoder, QueryDecoder)
    modules = [reference.output, *([reference.heads[name]] if name in reference.heads else [])]
    layers = [Linear(one.weight, one.bias) for one in modules if isinstance(one, nn.Linear)]
    if model.config.decoder.tied_to is not None and reference.embedding_bias is not None:
        adapter = model.inputs[model.config.decoder.tied_to]
        assert isinstance(adapter, TokenAdapter)
        layers.append(Linear(adapter.embedding.weight, reference.embedding_bias))
    return layers
