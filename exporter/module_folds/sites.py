# SPDX-License-Identifier: Apache-2.0
"""What becomes of each site of a model: folded or not, and how much of it is computed at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from perceiver_export.exporter.model.config import InputQueries, PositionQueries, QueryDecoder
from perceiver_export.exporter.model.perceiver import PerceiverDecoder, PerceiverIO
from perceiver_export.exporter.module_folds import decisions, plan
from perceiver_export.exporter.module_folds.modalities import modality_of, position_constants, query_modality
from perceiver_export.runtimes.manifest import FoldDecision, MemoryPlan, Part


@dataclass(frozen=True)
class Site:
    """A cross-attention: ``at_a_time`` latents, grid steps or queries; ``linear_tail`` of a decoder."""

    folded: bool
    at_a_time: int | None = None
    linear_tail: bool = False


@dataclass(frozen=True)
class Sites:
    """All of a model's; ``heads`` and ``rows`` are those of the latents' self-attention."""

    encoder: Site
    heads: int
    rows: int
    outputs: Mapping[str, Site]
    folds: tuple[FoldDecision, ...]
    memory: MemoryPlan

    def recorded(self, part: Part, name: str) -> Part:
        """The part of the manifest with what was decided for this graph: `model`, `encoder`, `decoder_NAME`."""
        prefix = name.replace("_", ".", 1)  # a decoder's name has its output's behind it

        def own(site: str) -> bool:
            return name == "model" or site == prefix or site.startswith(f"{prefix}.")

        folds = tuple(one for one in self.folds if own(one.site))
        stages = tuple(one for one in self.memory.stages if own(one.stage))
        if not stages:  # an average of the latents
            return part
        memory = MemoryPlan(self.memory.budget, max(one.bytes for one in stages), stages)
        return msgspec.structs.replace(part, folds=folds, plan=memory)


def choose_sites(model: PerceiverIO, budget: int, batch: int, queries: Mapping[str, int] | None) -> Sites:
    """The cheaper form of every site, in chunks that keep activations within ``budget`` bytes.

    ``batch``: the largest; ``queries``: how many of each output a call decodes, None for all of them.

    Raises UsageError: no chunk is small enough; it says what the least budget is.
    """
    config = model.config
    modalities = [modality_of(model, name) for name in config.inputs]
    encoder = decisions.few_queries(
        "encoder.cross_attention",
        config.encoder.cross_attention,
        config.encoder.num_latents,
        modalities,
        config.encoder.num_cross_attentions,
        len(model.encoder.cross_attentions),
    )
    stages = [
        plan.encoder(config, modalities, encoder.chosen == "folded", batch),
        plan.self_attention(config.encoder, batch),
    ]
    folds, outputs = [encoder], {}
    if isinstance(config.decoder, QueryDecoder):
        for name in config.decoder.outputs:
            count = None if queries is None else queries[name]
            attention, tail = _output_decisions(model, name, count)
            folded = attention is not None and attention.chosen == "folded"
            linear = tail is not None and tail.chosen == "folded"
            folds += [one for one in (attention, tail) if one is not None]
            stages.append(plan.decoder(model, name, folded, batch, count))
            outputs[name] = Site(folded, None, linear)
    chosen = plan.within(stages, budget)
    by_stage = {stage.stage: stage for stage in chosen}
    heads, rows = plan.heads_and_rows(config.encoder, by_stage["encoder.self_attentions"].at_a_time)
    return Sites(
        Site(encoder.chosen == "folded", by_stage["encoder.cross_attention"].at_a_time),
        heads,
        rows,
        {
            name: Site(one.folded, by_stage[f"decoder.{name}"].at_a_time, one.linear_tail)
            for name, one in outputs.items()
        },
        tuple(folds),
        MemoryPlan(budget, max(stage.bytes for stage in chosen), chosen),
    )


def _output_decisions(
    model: PerceiverIO, name: str, queries: int | None
) -> tuple[FoldDecision | None, FoldDecision | None]:
    """Of one output: its attention's and its tail's; None where there is nothing to fold."""
    config, decoder = model.config, model.decoder
    assert isinstance(config.decoder, QueryDecoder)
    assert isinstance(decoder, PerceiverDecoder)
    output, encoder = config.decoder.outputs[name], config.encoder
    count = min(queries or output.queries.num_queries, output.queries.num_queries)
    attention: FoldDecision | None = None
    sizes = (config.decoder.cross_attention, encoder.num_latents, encoder.num_latent_channels)
    if isinstance(output.queries, PositionQueries) and not config.decoder.cross_attention.query_residual:
        constants = position_constants(decoder, name, output.queries)
        attention = decisions.position_queries(f"decoder.{name}", *sizes, constants, count)
    elif isinstance(output.queries, InputQueries) and len(config.inputs) == 1 and not config.mask_queries:
        modality = query_modality(model, decoder, name)
        if queries is None and modality.num_features:
            attention = decisions.input_queries(f"decoder.{name}", *sizes, modality)
    widths = [
        width
        for width in (
            config.decoder.num_output_channels,
            output.num_channels,
            0 if decoder.embedding_bias is None else len(decoder.embedding_bias),
        )
        if width
    ]
    tail = None
    if config.decoder.mlp and widths:
        widening = config.decoder.cross_attention.widening_factor
        tail = decisions.linear_tail(f"decoder.{name}.tail", count, config.decoder.num_query_channels, widening, widths)
    return attention, tail
