# SPDX-License-Identifier: Apache-2.0
"""perceiver-io's names of our parameters; all of its versions have the same."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

from perceiver_export.exporter.checkpoints.huggingface_names import patches_to_kernel
from perceiver_export.exporter.checkpoints.state import Source, Sources

LATENTS = "0.latent_provider._query"
POSITIONS = "0.input_adapter.position_encoding.position_encoding"  # of pictures, computed, but stored
TOKEN_POSITIONS = "0.input_adapter.pos_embedding.weight"
QUERIES = "1.output_query_provider._query"
DECODER = "1.cross_attn"

_OUTSIDE_OF_LAYERS = {
    "encoder.latents": LATENTS,
    "inputs.tokens.embedding.weight": "0.input_adapter.txt_embedding.weight",
    "inputs.tokens.positions": TOKEN_POSITIONS,
    "inputs.frames.features.weight": "0.input_adapter.linear.weight",
    "inputs.frames.features.bias": "0.input_adapter.linear.bias",
    "decoder.queries.logits.table": QUERIES,
    "decoder.output.weight": "1.output_adapter.linear.weight",
    "decoder.output.bias": "1.output_adapter.linear.bias",
    "decoder.embedding_bias": "1.output_adapter.bias",
}
_ATTENTION = {
    "norm": "norm",
    "query_norm": "q_norm",
    "input_norm": "kv_norm",
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.output": "attention.o_proj",
}
_MLP = {"mlp_norm": "0", "mlp.hidden": "1", "mlp.output": "3"}


def krasserm_sources(decoder_residual: bool, converted: dict[str, Callable[[Tensor], Tensor]] | None = None) -> Sources:
    """Where our parameters are. perceiver-io wraps what has a residual in another module.

    ``converted`` says how tensors of its names become ours, beside the flow's kernel.
    """
    convert = {"0.input_adapter.linear.weight": patches_to_kernel, **(converted or {})}

    def source(own: str) -> Source:
        name = _OUTSIDE_OF_LAYERS.get(own) or _in_a_layer(own, decoder_residual)
        return Source(name, convert[name]) if name in convert else Source(name)

    return source


def _in_a_layer(own: str, decoder_residual: bool) -> str:
    found = re.fullmatch(r"(decoder|encoder)\.(cross|self)_attention(?:s\.(\d+))?(\.\d+)?\.(.+)\.(weight|bias)", own)
    assert found is not None
    part, kind, index, layer, module, parameter = found.groups()
    if part == "decoder":
        start, residual = DECODER, decoder_residual
    else:
        start, residual = f"0.{kind}_attn_{'1' if index == '0' else 'n'}{layer or ''}", True
    if module in _MLP:
        return f"{start}.1.module.{_MLP[module]}.{parameter}"
    return f"{start}.0{'.module' if residual else ''}.{_ATTENTION[module]}.{parameter}"
