# SPDX-License-Identifier: Apache-2.0
"""lucidrains' names of our parameters, in the layouts of perceiver-pytorch 0.8 to 0.10 and 0.11."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perceiver_export.exporter.checkpoints.state import Source, Sources
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError

LucidrainsModel = Literal["Perceiver", "PerceiverIO"]


@dataclass(frozen=True)
class Layout:
    """Where the layers are: ``i`` counts the layers, ``j`` the self-attentions in one."""

    model: LucidrainsModel
    cross_attention: str
    cross_mlp: str
    self_attention: str
    self_mlp: str


_LAYOUTS = (
    Layout(  # 0.11
        "Perceiver",
        "layers.{i}.cross_attn",
        "layers.{i}.cross_ff",
        "layers.{i}.self_attns.{j}.0",
        "layers.{i}.self_attns.{j}.1",
    ),
    Layout("Perceiver", "layers.{i}.0", "layers.{i}.1", "layers.{i}.2.{j}.0", "layers.{i}.2.{j}.1"),
    Layout(  # 0.11
        "PerceiverIO",
        "cross_attend_block.cross_attn",
        "cross_attend_block.cross_ff",
        "layers.{i}.self_attns.0.0",
        "layers.{i}.self_attns.0.1",
    ),
    Layout("PerceiverIO", "cross_attend_blocks.0", "cross_attend_blocks.1", "layers.{i}.0", "layers.{i}.1"),
)
DECODER, DECODER_MLP = "decoder_cross_attn", "decoder_ff"
QUERIES = "queries"  # trained queries, which lucidrains leaves to the caller, beside the model's own tensors

# What is found in the names of models that are others, though their sizes may be the same.
_OTHERS = (
    (r"\.to_attn_logits\.", "a model with attn_residual", "train it without attn_residual"),
    (r"\.gru\.", "the gated Perceiver", "Perceiver and PerceiverIO are supported"),
    (r"(\.fn\.to_qkv|^data_proj)\.", "the experimental Perceiver", "Perceiver and PerceiverIO are supported"),
    (r"^layers\.\d+\.2\.fn\.0\.", "the Perceiver with mixed latents", "Perceiver and PerceiverIO are supported"),
    (
        r"\.fn\.to_out\.0\.",
        "a Perceiver of perceiver-pytorch 0.7 or older, whose frequencies are others",
        "train it with perceiver-pytorch 0.8 or newer",
    ),
)

_IN_A_LAYER = {
    "norm": "norm",
    "query_norm": "norm",
    "input_norm": "norm_context",
    "attention.query": "fn.to_q",
    "attention.key": "fn.to_kv",
    "attention.value": "fn.to_kv",
    "attention.output": "fn.to_out",
    "mlp_norm": "norm",
    "mlp.hidden": "fn.net.0",
    "mlp.output": "fn.net.2",
}


def layout_of(names: Iterable[str]) -> Layout:
    """The layout of a checkpoint with such names. Raises UnsupportedModelError: of another class of the package."""
    names = list(names)
    for pattern, what, hint in _OTHERS:
        telling = next((name for name in names if re.search(pattern, name)), None)
        if telling is not None:
            raise UnsupportedModelError(f"the checkpoint is of {what}: it has {telling!r}", hint)
    is_io = any(name.startswith((f"{DECODER}.", "cross_attend_block")) for name in names)
    layouts = [layout for layout in _LAYOUTS if (layout.model == "PerceiverIO") == is_io]
    for layout in layouts:
        start = layout.cross_attention.format(i=0)
        if any(name.startswith(f"{start}.") for name in names):
            return layout
    if is_io:
        raise UnsupportedModelError(
            "the checkpoint is of a PerceiverIO of perceiver-pytorch 0.6 or older, whose layers are others",
            "train it with perceiver-pytorch 0.8 or newer",
        )
    return layouts[0]


def lucidrains_sources(layout: Layout) -> Sources:
    """Where our parameters are; `QUERIES` is none of lucidrains' own names."""
    head = "to_logits.2." if layout.model == "Perceiver" else "to_logits."

    def source(own: str) -> Source:
        if own == "encoder.latents":
            return Source("latents")
        if own.startswith("decoder.queries."):
            return Source(QUERIES)
        if own.startswith("decoder.norm."):
            return Source(own.replace("decoder.norm.", "to_logits.1."))
        if own.startswith("decoder.output."):
            return Source(own.replace("decoder.output.", head))
        if own.startswith("decoder.cross_attention."):
            return _in_a_layer(own.removeprefix("decoder.cross_attention."), DECODER, DECODER_MLP)
        found = re.fullmatch(r"encoder\.(cross|self)_attentions\.(\d+)\.(?:(\d+)\.)?(.+)", own)
        assert found is not None
        kind, i, j, rest = found.groups()
        if kind == "cross":
            return _in_a_layer(rest, layout.cross_attention.format(i=i), layout.cross_mlp.format(i=i))
        return _in_a_layer(rest, layout.self_attention.format(i=i, j=j), layout.self_mlp.format(i=i, j=j))

    return source


def without_tied(state: Mapping[str, Tensor], first: int, depth: int) -> dict[str, Tensor]:
    """``state`` without the layers behind ``first``, which all are that one, as they should be with tied weights.

    Raises CheckpointError: they are not.
    """
    kept = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if found is None or not first < int(found[1]) < depth:
            kept[name] = tensor
            continue
        same = f"layers.{first}.{found[2]}"
        if not torch.equal(tensor, kept.setdefault(same, state.get(same, tensor))):
            raise CheckpointError(
                f"{name!r} and {same!r} differ, with weight_tie_layers they are one",
                "set weight_tie_layers of the config to false, or give the model's own checkpoint",
            )
    return kept


def _in_a_layer(rest: str, attention: str, mlp: str) -> Source:
    module, _, kind = rest.rpartition(".")
    layer = mlp if module.startswith("mlp") else attention
    return Source(f"{layer}.{_IN_A_LAYER[module]}.{kind}", _HALVES.get(module, _whole))


def _keys(weight: Tensor) -> Tensor:
    return weight.chunk(2)[0]


def _values(weight: Tensor) -> Tensor:
    return weight.chunk(2)[1]


def _whole(tensor: Tensor) -> Tensor:
    return tensor


_HALVES: dict[str, Callable[[Tensor], Tensor]] = {"attention.key": _keys, "attention.value": _values}
