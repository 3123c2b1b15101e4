# SPDX-License-Identifier: Apache-2.0
"""A Perceiver with its folds: the same function as `PerceiverIO`, in the same steps, with less work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from perceiver_export.exporter.model.attention import CrossAttention, SelfAttention
from perceiver_export.exporter.model.config import MaskedInput, QueryDecoder
from perceiver_export.exporter.model.perceiver import PerceiverDecoder, PerceiverEncoder, PerceiverIO, joined_mask
from perceiver_export.exporter.module_folds.decoder import FoldedDecoder
from perceiver_export.exporter.module_folds.deviation import Modality
from perceiver_export.exporter.module_folds.few_queries import FewQueriesAttention
from perceiver_export.exporter.module_folds.many_queries import InputQueriesAttention
from perceiver_export.exporter.module_folds.modalities import Features, modality_of
from perceiver_export.exporter.module_folds.position_queries import PositionQueriesAttention
from perceiver_export.exporter.module_folds.self_attention import ChunkedSelfAttention
from perceiver_export.exporter.module_folds.sites import Sites


class FoldedPerceiver(PerceiverIO):
    """Made from a `PerceiverIO`, whose weights it shares; ``sites`` says what is folded, and its chunks."""

    def __init__(self, model: PerceiverIO, sites: Sites) -> None:
        nn.Module.__init__(self)
        self.config, self.sites = model.config, sites
        self.inputs, self.input_paddings = model.inputs, model.input_paddings
        modalities = {name: modality_of(model, name) for name in model.config.inputs}
        self.features = nn.ModuleDict(
            {
                name: Features(model.inputs[name], modality.basis is not None)
                for name, modality in modalities.items()
                if not isinstance(model.config.inputs[name], MaskedInput)
            }
        )
        residual = isinstance(model.decoder, PerceiverDecoder) and model.decoder.cross_attention.query_residual
        first, modality = next(iter(model.inputs.values())), next(iter(modalities.values()))
        self.query_features = Features(first, modality.basis is not None and not residual)
        self.sizes = [modality.constants.num_rows for modality in modalities.values()]
        self.encoder = FoldedEncoder(model, list(modalities.values()), sites)
        self.decoder = model.decoder
        if isinstance(model.decoder, PerceiverDecoder):
            self.decoder = FoldedDecoder(model, model.decoder, sites)

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        latents = self.encode(feeds)
        if not isinstance(self.config.decoder, QueryDecoder):
            return {self.config.decoder.output: self.decoder(latents)}
        outputs: dict[str, Tensor] = {}
        for name, output in self.config.decoder.outputs.items():
            rows = self.decode(name, latents, None, feeds, mask=self._mask(feeds))
            outputs[name] = rows.reshape(rows.shape[0], *output.shape)
        return outputs

    def encode(self, feeds: Mapping[str, Tensor]) -> Tensor:
        if not self.sites.encoder.folded:
            return super().encode(feeds)
        features = [self._features(name, feeds) for name in self.config.inputs]
        latents: Tensor = self.encoder(features, self._mask(feeds))
        return latents

    def decode(
        self,
        name: str,
        latents: Tensor,
        indices: Tensor | None,
        feeds: Mapping[str, Tensor],
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(self.decoder, FoldedDecoder)
        site = self.decoder.sites[name]
        rows: Tensor
        if isinstance(site, InputQueriesAttention) and indices is None:
            # Computed for the encoder too: equal nodes of a graph become one.
            rows = site(latents, self.query_features(feeds[next(iter(self.config.inputs))]))
        elif isinstance(site, PositionQueriesAttention):
            rows = site(latents, indices)
        else:
            queries = self.decoder.padded(name, self.queries_of(name, indices, feeds, inputs))
            rows = self.decoder.plain[name](queries, latents, self.query_mask(indices, mask))
        return rows

    def _features(self, name: str, feeds: Mapping[str, Tensor]) -> Tensor | None:
        if name not in self.features:
            return None
        features: Tensor = self.features[name](feeds[name])
        return features

    def _mask(self, feeds: Mapping[str, Tensor]) -> Tensor | None:
        masks = [feeds.get(f"{name}_mask") for name in self.config.inputs]
        return joined_mask(masks, self.sizes, next(iter(feeds.values())).shape[0])


class FoldedEncoder(PerceiverEncoder):
    """The features of each input (B, C_f, M), and which rows are there (B, M) -> latents (B, N, D)."""

    def __init__(self, model: PerceiverIO, modalities: Sequence[Modality], sites: Sites) -> None:
        nn.Module.__init__(self)
        reference = model.encoder
        self.config, self.latents = reference.config, reference.latents
        self.cross_attentions = reference.cross_attentions
        if sites.encoder.folded:
            self.cross_attentions = nn.ModuleList(
                FewQueriesAttention(one, modalities, sites.encoder.at_a_time)
                for one in reference.cross_attentions
                if isinstance(one, CrossAttention)
            )
        self.self_attentions = nn.ModuleList(
            nn.ModuleList(
                ChunkedSelfAttention(layer, sites.heads, sites.rows)
                for layer in block.modules()
                if isinstance(layer, SelfAttention)
            )
            for block in reference.self_attentions
        )
