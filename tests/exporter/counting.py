# SPDX-License-Identifier: Apache-2.0
"""Parameters and FLOPs of a config as torch counts them, on the meta device."""

from __future__ import annotations

import torch
from msgspec.structs import replace
from torch.utils.flop_counter import FlopCounterMode

from perceiver_export.exporter.graphs import Batch, input_specs
from perceiver_export.exporter.model.config import PerceiverConfig, QueryDecoder
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.exporter.presets import Counts


def meta_feeds(config: PerceiverConfig) -> dict[str, torch.Tensor]:
    """One sample, without memory."""
    return {
        spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")  # type: ignore[arg-type]
        for spec in input_specs(config, Batch.parse(1))
    }


def count(config: PerceiverConfig) -> Counts:
    """The counts of one sample."""
    with torch.device("meta"):
        return count_model(PerceiverIO(config).eval())


def count_model(model: PerceiverIO) -> Counts:
    """The same of a model on the meta device. Its latent layers are all alike: one is counted, and the rest without."""
    config, encoder = model.config, model.config.encoder
    feeds, decoder = meta_feeds(config), config.decoder
    layers = [layer for block in model.encoder.self_attentions for layer in block.children()]
    with torch.device("meta"), torch.inference_mode():
        without = replace(config, encoder=replace(encoder, num_self_attentions_per_block=0))
        rest = PerceiverIO(without).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as one_layer:
            for layer in layers[:1]:
                layer(torch.zeros(1, encoder.num_latents, encoder.num_latent_channels))
        with FlopCounterMode(display=False) as whole:
            rest(feeds)
        one_query = whole
        if isinstance(decoder, QueryDecoder):
            inputs = rest.embed(feeds)[0]  # once, for the encoder
            with FlopCounterMode(display=False) as one_query:
                latents = rest.encode(feeds)
                for name in decoder.outputs:
                    rest.decode(name, latents, torch.zeros(1, 1, dtype=torch.int64), feeds, inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    of_layers = encoder.num_blocks * encoder.num_self_attentions_per_block * one_layer.get_total_flops()
    return Counts(parameters, whole.get_total_flops() + of_layers, one_query.get_total_flops() + of_layers)
