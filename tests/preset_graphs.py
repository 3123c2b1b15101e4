# SPDX-License-Identifier: Apache-2.0
"""Graphs of the presets, at the papers' widths and any depth, as export makes them; and an int8 form of each."""

from __future__ import annotations

import msgspec
import numpy as np
import onnx_ir as ir
import torch

from perceiver_export.calibration.graphs import split_gemms
from perceiver_export.calibration.quantization.integers import LinearPlan, quantize_channels, write_qdq
from perceiver_export.calibration.quantization.linears import find_linears
from perceiver_export.exporter.graphs import Batch, GraphPart, split_model, whole_model
from perceiver_export.exporter.model.config import PerceiverConfig
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.exporter.presets import PRESETS, flow
from perceiver_export.exporter.trace import folded_graph

# Of activations behind a LayerNorm: graphs that are only compiled need some scale, not a measured one.
_SCALE = 4.0 / 127
_MEMORY_BUDGET = 512 << 20  # export's default, in bytes
SMALL_FLOW = "optical-flow of 92 × 124"  # a sixteenth of the pixels: fewer pieces of the same two cross-attentions


def preset_config(name: str, layers: int | None = None, blocks: int | None = None) -> PerceiverConfig:
    """The preset with at most so many latent layers a block and blocks; None leaves what it has."""
    small = name == SMALL_FLOW
    config = flow.func(92, 124, *flow.args[2:], "deepmind") if small else PRESETS[name].build("deepmind")
    encoder = config.encoder
    most = min(encoder.num_blocks, blocks or encoder.num_blocks)
    reduced = msgspec.structs.replace(
        encoder,
        num_blocks=most,
        num_self_attentions_per_block=min(
            encoder.num_self_attentions_per_block, layers or encoder.num_self_attentions_per_block
        ),
        num_cross_attentions=min(encoder.num_cross_attentions, most),
    )
    return msgspec.structs.replace(config, encoder=reduced)


def preset_parts(
    name: str, layers: int | None = None, blocks: int | None = None
) -> tuple[PerceiverConfig, list[GraphPart]]:
    """The preset's parts with random weights: split where export does so by itself."""
    config = preset_config(name, layers, blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PerceiverIO(config).eval()
    split = name == "video-autoencoding"
    return config, list(split_model(model, Batch.parse(1)) if split else (whole_model(model, Batch.parse(1)),))


def preset_graphs(
    name: str, layers: int | None = None, blocks: int | None = None, fold: bool = True
) -> dict[str, ir.Model]:
    """The preset's canonical graphs by part, as export writes them."""
    config, parts = preset_parts(name, layers, blocks)
    return {part.name: traced(part, config, fold) for part in parts}


def traced(part: GraphPart, config: PerceiverConfig, fold: bool = False) -> ir.Model:
    """The graph of a part as export makes it."""
    return folded_graph(part, config, fold, _MEMORY_BUDGET).model


def quantized(model: ir.Model, scale: float = _SCALE) -> int:
    """Put Q/DQ round every linear, in place, with one scale for all activations; how many linears there are."""
    split_gemms(model.graph)
    linears, _ = find_linears(model.graph)
    weights: dict[ir.Value, LinearPlan] = {}
    plans = []
    for linear in linears:
        known = weights.get(linear.weight)
        array = linear.weight.const_value
        assert array is not None
        weight = known.weight if known else quantize_channels(np.asarray(array.numpy()))
        plan = LinearPlan(linear, "int8", weight, scale)
        weights.setdefault(linear.weight, plan)
        plans.append(plan)
    write_qdq(model, plans)
    return len(linears)
