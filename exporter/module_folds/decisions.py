# SPDX-License-Identifier: Apache-2.0
"""Which folds pay: FLOPs and bytes of both forms at every site, for one sample.

A multiply-add is 2 FLOPs. Bytes are those of the large arrays (scores, keys, values, queries) at each time that they
are read or written, in float32. What is cheaper is chosen, a byte counted as `FLOPS_A_BYTE`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from perceiver_export.exporter.model.config import AttentionConfig
from perceiver_export.exporter.module_folds.constants import Constants
from perceiver_export.exporter.module_folds.deviation import Modality
from perceiver_export.runtimes.manifest import Cost, FoldDecision

# Of a 2-core VNNI Xeon under ONNX Runtime: 430 GFLOP/s in large products, 40 GB/s in element-wise passes.
FLOPS_A_BYTE = 10
_FLOAT = 4
# FLOPs; less than a millisecond anywhere. A tail of one query stays as it is, and can be quantized as it is.
_NEXT_TO_NOTHING = 1 << 24
_MOST_AXES = 3


def few_queries(
    site: str,
    config: AttentionConfig,
    num_queries: int,
    modalities: Sequence[Modality],
    reads: int = 1,
    distinct: int = 1,
) -> FoldDecision:
    """An encoder's cross-attention: N queries over M inputs of C channels.

    It is run ``reads`` times, with ``distinct`` sets of weights. Unfolded, reads with the same weights have their keys
    and values in common, which do not depend on the latents.
    """
    count = sum(one.constants.num_rows for one in modalities)
    channels, widths = modalities[0].num_channels, config.num_qk_channels + config.num_v_channels
    scores = num_queries * count
    plain = _cost(
        distinct * 2 * count * channels * widths + reads * 2 * scores * widths,
        distinct * 2 * count * (channels + widths) + reads * 4 * scores * config.num_heads,
    )
    flops = numbers = features = 0
    for one in modalities:
        rows = num_queries * one.constants.num_rows * config.num_heads
        own = one.num_values + 2 + one.constants.num_free_channels
        flops += 4 * rows * own
        # written, scaled, softmax, read; each axis of the positions is added, and summed over
        numbers += rows * (6 + 3 * one.constants.num_axes)
        features += 4 * one.constants.num_rows * own  # in common to all reads
    flops += 2 * num_queries * config.num_heads * channels * widths
    axes = max(len(one.constants.shape) for one in modalities)
    folded = _cost(reads * flops, reads * numbers + features)
    return _decide(site, plain, folded, "keys and values of the inputs are not computed", axes)


def input_queries(
    site: str, config: AttentionConfig, num_latents: int, num_latent_channels: int, modality: Modality
) -> FoldDecision:
    """A decoder whose M queries are the inputs."""
    count, channels = modality.constants.num_rows, modality.num_channels
    plain = _plain_decoder(config, count, channels, num_latents, num_latent_channels)
    rows = count * num_latents * config.num_heads
    own = modality.num_values + 2 + modality.constants.num_free_channels
    further = max(modality.constants.num_axes - 1, 0)
    folded = _cost(
        2 * rows * (own + channels) + _keys(config, num_latents, num_latent_channels, channels),
        rows * (6 + 2 * further) + count * (3 * own + 2 * channels),
    )
    how = "queries are projected into the keys, the output into the values"
    return _decide(site, plain, folded, how, len(modality.constants.shape))


def position_queries(
    site: str, config: AttentionConfig, num_latents: int, num_latent_channels: int, constants: Constants, count: int
) -> FoldDecision:
    """A decoder whose ``count`` queries are points of a grid."""
    channels = constants.num_channels
    plain = _plain_decoder(config, count, channels, num_latents, num_latent_channels)
    rows = count * num_latents * config.num_heads
    folded = _cost(
        2 * rows * channels
        + sum(2 * num_latents * term.table.numel() for term in constants.terms) * config.num_heads
        + _keys(config, num_latents, num_latent_channels, channels),
        rows * (9 + 3 * constants.num_axes) + 2 * count * channels,
    )
    return _decide(site, plain, folded, "scores of grid points are sums of one row an axis")


def linear_tail(site: str, count: int, channels: int, widening: int, widths: Sequence[int]) -> FoldDecision:
    """What follows a decoder's attention: the MLP's second layer and all linear layers behind it as one."""
    hidden, last = channels * widening, widths[-1]
    layers = [hidden, channels, *widths]
    plain = _cost(
        2 * count * (channels * hidden + sum(a * b for a, b in itertools.pairwise(layers))),
        count * (2 * channels + 4 * hidden + 3 * channels + 2 * sum(widths)),
    )
    folded = _cost(
        2 * count * (channels * hidden + hidden * last + channels * last),
        count * (2 * channels + 4 * hidden + 4 * last),
    )
    return _decide(site, plain, folded, "linear layers behind the GELU are one")


def _plain_decoder(config: AttentionConfig, count: int, channels: int, num_latents: int, width: int) -> Cost:
    qk, v = config.num_qk_channels, config.num_v_channels
    return _cost(
        2 * count * channels * (qk + v) + 2 * count * num_latents * (qk + v) + 2 * num_latents * width * (qk + v),
        count * (3 * channels + 2 * (qk + v)) + 4 * count * num_latents * config.num_heads,
    )


def _keys(config: AttentionConfig, num_latents: int, width: int, channels: int) -> int:
    widths = config.num_qk_channels + config.num_v_channels
    return 2 * num_latents * widths * (width + channels)


def _cost(flops: int, numbers: int) -> Cost:
    return Cost(flops, numbers * _FLOAT)


def _decide(site: str, plain: Cost, folded: Cost, how: str, axes: int = 1) -> FoldDecision:
    ratio = _weighed(plain) / _weighed(folded)
    if axes > _MOST_AXES:
        why = f"{axes} axes of positions would need tensors of rank {axes + 3}; engines take 6"
        return FoldDecision(site, plain, folded, "plain", why)
    if 0 < _weighed(plain) - _weighed(folded) < _NEXT_TO_NOTHING:
        return FoldDecision(site, plain, folded, "plain", "folding would save next to nothing")
    if ratio > 1:
        return FoldDecision(site, plain, folded, "folded", f"{how}: {ratio:.1f} times less work and traffic")
    less = "as much" if math.isclose(ratio, 1, rel_tol=0.05) else f"{1 / ratio:.1f} times the"
    return FoldDecision(site, plain, folded, "plain", f"folded would be {less} work and traffic")


def _weighed(cost: Cost) -> int:
    return cost.flops + FLOPS_A_BYTE * cost.bytes
