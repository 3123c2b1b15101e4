# SPDX-License-Identifier: Apache-2.0
"""How much of each stage is computed at a time, so that activations stay within a budget.

Rows of a softmax do not depend on each other: an encoder's cross-attention is cut by latents, the latents'
self-attention by heads and rows, a decoder by queries, and the result is the same. What a stage needs is counted from
the arrays that live at once in the folded modules: inputs and results for the whole of it, scores and what is made of
them for each piece. Scores count twice, since an engine reads one array to write the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perceiver_export.exporter.model.config import (
    EncoderConfig,
    InputQueries,
    PerceiverConfig,
    PositionQueries,
    QueryDecoder,
    TokenInput,
)
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.exporter.module_folds.deviation import Modality
from perceiver_export.exporter.module_folds.modalities import modality_of
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.manifest import PlannedStage

_FLOAT = 4
_MIB = 1 << 20
# Larger pieces are not faster: measured with 64 to 256 rows of flow's encoder, 2 to 16 grid rows of its decoder.
_ENCODER_PIECE, _PIECE = 192 << 20, 64 << 20
_SCORES = 2


@dataclass(frozen=True)
class Stage:
    """Bytes of a stage: ``fixed``, and ``each`` for every unit of ``count``; no piece needs to exceed ``largest``."""

    name: str
    unit: str
    count: int
    fixed: int
    each: int
    largest: int = _PIECE

    def within(self, budget: int) -> PlannedStage:
        """As much at a time as the budget allows, in pieces of equal size."""
        most = max(1, min(self.count, (budget - self.fixed) // self.each, self.largest // self.each))
        pieces = -(-self.count // most)
        size = -(-self.count // pieces)
        return PlannedStage(self.name, self.unit, size, self.count, self.fixed + size * self.each)


def within(stages: Sequence[Stage], budget: int) -> tuple[PlannedStage, ...]:
    """All stages in pieces that keep to the budget. Raises UsageError with the least that would do."""
    worst = max(stages, key=lambda stage: stage.fixed + stage.each)
    if worst.fixed + worst.each > budget:
        least = -(-(worst.fixed + worst.each) // _MIB)
        raise UsageError(
            f"{worst.name} needs {least} MiB of activations at least, the budget is {budget / 2**20:,.4g} MiB",
            f"--memory-budget {least}MiB or more",
        )
    return tuple(stage.within(budget) for stage in stages)


def encoder(config: PerceiverConfig, modalities: Sequence[Modality], folded: bool, batch: int) -> Stage:
    """Inputs are read by some latents at a time; unfolded, by all."""
    latents, attention = config.encoder, config.encoder.cross_attention
    count = sum(one.constants.num_rows for one in modalities)
    masked = any(isinstance(one, TokenInput) or getattr(one, "masked", False) for one in config.inputs.values())
    scores = attention.num_heads * count * (_SCORES + masked) * _FLOAT * batch
    if folded:
        numbers = sum(one.constants.num_rows * (3 * one.num_values + 4) for one in modalities)
        return Stage(
            "encoder.cross_attention", "latents", latents.num_latents, numbers * _FLOAT * batch, scores, _ENCODER_PIECE
        )
    widths = 2 * config.num_input_channels + attention.num_qk_channels + attention.num_v_channels
    return Stage(
        "encoder.cross_attention",
        "encoder",
        1,
        0,
        count * widths * _FLOAT * batch + scores * latents.num_latents,
    )


def self_attention(config: EncoderConfig, batch: int) -> Stage:
    """Heads times rows: a piece is some heads, or some rows of one head."""
    attention, count = config.self_attention, config.num_latents
    widths = 4 * config.num_latent_channels + 2 * attention.num_qk_channels + 2 * attention.num_v_channels
    widths = max(widths, config.num_latent_channels * (3 + 2 * attention.widening_factor))
    return Stage(
        "encoder.self_attentions",
        "rows of all heads",
        attention.num_heads * count,
        count * widths * _FLOAT * batch,
        count * _SCORES * _FLOAT * batch,
    )


def heads_and_rows(config: EncoderConfig, at_a_time: int) -> tuple[int, int]:
    """``at_a_time`` of heads × latents as whole heads, or as equal parts of one head's rows."""
    heads, count = config.self_attention.num_heads, config.num_latents
    if at_a_time < count:
        return 1, at_a_time
    most = at_a_time // count
    pieces = -(-heads // most)
    return -(-heads // pieces), count


def decoder(model: PerceiverIO, name: str, folded: bool, batch: int, queries: int | None) -> Stage:
    """Some queries at a time, where they are folded; else all of a call."""
    config = model.config.decoder
    assert isinstance(config, QueryDecoder)
    output, attention, latents = config.outputs[name], config.cross_attention, model.config.encoder
    total = min(queries or output.queries.num_queries, output.queries.num_queries)
    channels = config.num_query_channels
    rows = math.prod(output.shape) // output.queries.num_queries
    tail = channels * (2 + 2 * attention.widening_factor)
    each = attention.num_heads * latents.num_latents * _SCORES + max(2 * channels, tail)
    fixed = total * rows + latents.num_latents * (2 * latents.num_latent_channels + 3 * channels * attention.num_heads)
    if folded and isinstance(output.queries, InputQueries):
        (modality,) = (modality_of(model, one) for one in model.config.inputs)
        fixed += total * (3 * modality.num_values + 4)
        shape = modality.constants.shape
        steps = shape[0] if len(shape) > 1 else 1
        return _stage(name, "grid rows", steps, fixed, each * (total // steps), batch)
    if folded and isinstance(output.queries, PositionQueries):
        return _stage(name, "queries", total, fixed, each + attention.num_heads * latents.num_latents, batch)
    plain = each + 2 * channels + attention.num_qk_channels + attention.num_v_channels
    return _stage(name, "decoder", 1, fixed, total * plain, batch)


def _stage(name: str, unit: str, count: int, fixed: int, each: int, batch: int) -> Stage:
    return Stage(f"decoder.{name}", unit, count, fixed * _FLOAT * batch, each * _FLOAT * batch)
