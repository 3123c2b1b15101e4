# SPDX-License-Identifier: Apache-2.0
"""Sizes that the shapes of a lucidrains state dict tell, beside those that its config says."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from perceiver_export.exporter.checkpoints.lucidrains_config import Arguments, Perceiver, PerceiverIO
from perceiver_export.exporter.checkpoints.lucidrains_names import DECODER, DECODER_MLP, Layout
from perceiver_export.runtimes.errors import CheckpointError

# A field, what the config says, and what the checkpoint does, if anything.
_Size = tuple[str, int, int | None]


def check_sizes(arguments: Arguments, state: Mapping[str, Tensor], layout: Layout) -> None:
    """Raise CheckpointError where a shape tells another number than the config, with the field's name.

    Tensors that are not there are left to `load_model_state`, which lists them.
    """
    own = (
        _decoder(arguments, state, layout) if isinstance(arguments, PerceiverIO) else _layers(arguments, state, layout)
    )
    for field, said, found in (*_common(arguments, state, layout), *own):
        if found not in (said, None):
            raise CheckpointError(
                f"{field} is {said} in the config, {found} in the checkpoint", "config and weights are not of one model"
            )


def _common(arguments: Arguments, state: Mapping[str, Tensor], layout: Layout) -> tuple[_Size, ...]:
    depth = _count(state, "layers.{i}.")
    # Of tied layers a file may hold the first of those that are one, and no other.
    first = 1 if layout.model == "PerceiverIO" else 2
    shortened = arguments.weight_tie_layers and depth == min(first, arguments.depth)
    cross, self_ = layout.cross_attention.format(i=0), layout.self_attention.format(i=0, j=0)
    cross_width = arguments.cross_heads * arguments.cross_dim_head
    latent_width = arguments.latent_heads * arguments.latent_dim_head
    return (
        ("num_latents", arguments.num_latents, _size(state, "latents", 0)),
        ("latent_dim", arguments.latent_dim, _size(state, "latents", 1)),
        ("depth", arguments.depth, None if shortened else depth),
        ("cross_heads · cross_dim_head", cross_width, _size(state, f"{cross}.fn.to_q.weight", 0)),
        ("latent_heads · latent_dim_head", latent_width, _size(state, f"{self_}.fn.to_q.weight", 0)),
    )


def _layers(arguments: Perceiver, state: Mapping[str, Tensor], layout: Layout) -> tuple[_Size, ...]:
    self_attentions = layout.self_attention.replace("{i}", "0").replace("{j}.0", "{i}.")
    channels = _size(state, f"{layout.cross_attention.format(i=0)}.norm_context.weight", 0)
    formula = "input_channels + input_axis · (2 · num_freq_bands + 1)"
    return (
        (formula if arguments.fourier_encode_data else "input_channels", arguments.num_input_channels, channels),
        ("self_per_cross_attn", arguments.self_per_cross_attn, _count(state, self_attentions)),
        ("num_classes", arguments.num_classes, _size(state, "to_logits.2.weight", 0)),
    )


def _decoder(arguments: PerceiverIO, state: Mapping[str, Tensor], layout: Layout) -> tuple[_Size, ...]:
    return (
        ("dim", arguments.dim, _size(state, f"{layout.cross_attention}.norm_context.weight", 0)),
        ("queries_dim", arguments.queries_dim, _size(state, f"{DECODER}.norm.weight", 0)),
        ("decoder_ff", arguments.decoder_ff, f"{DECODER_MLP}.norm.weight" in state),
        ("logits_dim", arguments.logits_dim or 0, _size(state, "to_logits.weight", 0) or 0),
    )


def _size(state: Mapping[str, Tensor], name: str, axis: int) -> int | None:
    tensor = state.get(name)
    return int(tensor.shape[axis]) if tensor is not None and axis < tensor.ndim else None


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many there are of 0, 1, … in the names that ``pattern`` starts."""
    index = 0
    while any(name.startswith(pattern.format(i=index)) for name in state):
        index += 1
    return index
