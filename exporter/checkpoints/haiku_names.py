# SPDX-License-Identifier: Apache-2.0
"""Haiku's names of our parameters in DeepMind's six released models, and how their layout becomes ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from perceiver_export.exporter.checkpoints.huggingface_names import patches_to_kernel
from perceiver_export.exporter.checkpoints.state import Source, Sources

HaikuModel = Literal[
    "language", "imagenet-learned", "imagenet-fourier", "imagenet-conv", "optical-flow", "video-autoencoding"
]

_DECODERS: dict[HaikuModel, str] = {
    "language": "basic_decoder",
    "imagenet-learned": "classification_decoder/~/basic_decoder",
    "imagenet-fourier": "classification_decoder/~/basic_decoder",
    "imagenet-conv": "classification_decoder/~/basic_decoder",
    "optical-flow": "flow_decoder/~/basic_decoder",
    "video-autoencoding": "multimodal_decoder/~/basic_decoder",
}
_TABLE = "trainable_position_encoding/pos_embs"
LABEL_QUERY = f"classification_decoder/~/basic_decoder/~/{_TABLE}"  # of the video autoencoder
EMBEDDING = "embed/embeddings"
TOKEN_POSITIONS = _TABLE
PIXEL_CONV = "image_preprocessor/~/conv2_d"
PIXEL_POSITIONS = f"image_preprocessor/~_build_network_inputs/{_TABLE}"
POSITION_PROJECTION = "image_preprocessor/~_build_network_inputs/position_encoding_projector/linear"
DOWNSAMPLE_CONV = "image_preprocessor/~/conv2_d_downsample/~/conv"
DOWNSAMPLE_NORM = "image_preprocessor/~/conv2_d_downsample/~/batchnorm"
PATCHES_LINEAR = "image_preprocessor/patches_linear"

# What is not a linear layer or a norm: our name, theirs.
_TABLES = {
    "decoder.embedding_bias": "embedding_decoder/bias",
    "inputs.tokens.embedding.weight": EMBEDDING,
    "inputs.tokens.positions": TOKEN_POSITIONS,
    "inputs.image.positions.table": PIXEL_POSITIONS,
    "inputs.label.token": "multimodal_preprocessor/label_mask_token/pos_embs",
    "input_paddings.audio": "multimodal_preprocessor/audio_padding/pos_embs",
    "input_paddings.frames": "multimodal_preprocessor/image_padding/pos_embs",
    "decoder.paddings.sound": "multimodal_decoder/~decoder_query/audio_padding/pos_embs",
    "decoder.paddings.video": "multimodal_decoder/~decoder_query/image_padding/pos_embs",
    "decoder.paddings.label": "multimodal_decoder/~decoder_query/label_padding/pos_embs",
    "decoder.queries.label.table": LABEL_QUERY,
}
_LINEAR = {
    "inputs.image.positions.projection": POSITION_PROJECTION,
    "decoder.heads.sound": "audio_postprocessor/linear",
    "decoder.heads.video": "projection_postprocessor/linear",
    "decoder.heads.label": "classification_postprocessor/linear",
}
_IN_A_LAYER = {
    "attention.query": "attention/linear",
    "attention.key": "attention/linear_1",
    "attention.value": "attention/linear_2",
    "attention.output": "attention/linear_3",
    "mlp.hidden": "mlp/linear",
    "mlp.output": "mlp/linear_1",
}
_CROSS_NORMS = {"query_norm": "layer_norm", "input_norm": "layer_norm_1", "mlp_norm": "layer_norm_2"}
_SELF_NORMS = {"norm": "layer_norm", "mlp_norm": "layer_norm_1"}
_BATCH_NORM = {
    "weight": "scale",
    "bias": "offset",
    # `average` is the debiased mean, which inference reads; `hidden` is what it is computed from.
    "running_mean": "~/mean_ema/average",
    "running_var": "~/var_ema/average",
}
# Of the video autoencoder: what training reads and inference does not (the label is always masked, the rest never).
_DEAD = frozenset(
    f"multimodal_preprocessor/{name}/pos_embs" for name in ("audio_mask_token", "image_mask_token", "label_padding")
)

# A part of a name that tells the model; the first that is found counts.
_TELLING: tuple[tuple[str, HaikuModel], ...] = (
    ("embedding_decoder/", "language"),
    ("flow_decoder/", "optical-flow"),
    ("multimodal_", "video-autoencoding"),
    ("conv2_d_downsample/", "imagenet-conv"),
    ("position_encoding_projector/", "imagenet-learned"),
    ("classification_decoder/", "imagenet-fourier"),
)


def haiku_sources(model: HaikuModel, swap_kernel: bool = False) -> Sources:
    """Where our parameters are in a Haiku checkpoint of ``model``; Haiku's linear layers are (in, out).

    ``swap_kernel`` exchanges height and width of the 7×7 convolution's kernel, as transformers' conversion of
    DeepMind's weights does: its published checkpoint, and so its numerics, have it thus.
    """
    tables = {
        **_TABLES,
        "encoder.latents": latents_name(model),
        "decoder.queries.logits.table": f"{_DECODERS[model]}/~/{_TABLE}",
    }

    def source(own: str) -> Source:
        if own in tables:
            return Source(tables[own])
        module, _, kind = own.rpartition(".")
        if module == "inputs.image.features.norm":
            return Source(f"{DOWNSAMPLE_NORM}/{_BATCH_NORM[kind]}", _flattened)
        if module == "inputs.image.features.conv":
            return Source(f"{DOWNSAMPLE_CONV}/w", _swapped_kernel if swap_kernel else hwio_to_oihw)
        if module == "inputs.image.features":
            return Source(f"{PIXEL_CONV}/w", hwio_to_oihw) if kind == "weight" else Source(f"{PIXEL_CONV}/b")
        if module == "inputs.frames.features" and kind == "weight":
            return Source(f"{PATCHES_LINEAR}/w", lambda weight: patches_to_kernel(_transposed(weight)))
        theirs = _module(model, module)
        if "norm" in theirs.rpartition("/")[2]:
            return Source(f"{theirs}/scale" if kind == "weight" else f"{theirs}/offset")
        return Source(f"{theirs}/w", _transposed) if kind == "weight" else Source(f"{theirs}/b")

    return source


def ignored_names(names: Iterable[str]) -> frozenset[str]:
    """Those of ``names`` that no inference reads: tokens that never stand in, and batch norm's own counts."""
    return frozenset(name for name in names if name in _DEAD or name.rpartition("/")[2] in ("hidden", "counter"))


def released_model(names: Iterable[str]) -> HaikuModel | None:
    """Which of the released models has parameters of such names; None where none has."""
    names = list(names)
    for part, model in _TELLING:
        if any(part in name for name in names):
            return model
    return None


def encoder_module(model: HaikuModel) -> str:
    """The module that holds the encoder's."""
    return "encoder/~" if model == "video-autoencoding" else "perceiver_encoder/~"


def decoder_module(model: HaikuModel) -> str:
    """The module that holds the decoder's."""
    return _DECODERS[model]


def latents_name(model: HaikuModel) -> str:
    """The parameter (N, D) of the latents."""
    return f"{encoder_module(model)}/{_TABLE}"


def hwio_to_oihw(kernel: Tensor) -> Tensor:
    """A convolution's kernel, height, width, in, out -> out, in, height, width."""
    return torch.permute(kernel, (3, 2, 0, 1)).contiguous()


def _swapped_kernel(kernel: Tensor) -> Tensor:
    return torch.permute(kernel, (3, 2, 1, 0)).contiguous()


def _transposed(weight: Tensor) -> Tensor:
    return torch.permute(weight, (1, 0)).contiguous()


def _flattened(tensor: Tensor) -> Tensor:
    return tensor.flatten()


def _module(model: HaikuModel, own: str) -> str:
    """Haiku's module for a linear layer or a LayerNorm of ours."""
    if own == "inputs.frames.features":
        return PATCHES_LINEAR
    if own == "decoder.output":
        return f"{_DECODERS[model]}/output"
    if own in _LINEAR:
        return _LINEAR[own]
    if own.startswith("decoder.cross_attention."):
        rest = own.removeprefix("decoder.cross_attention.")
        return f"{_DECODERS[model]}/cross_attention/{({**_IN_A_LAYER, **_CROSS_NORMS})[rest]}"
    if own.startswith("encoder.cross_attentions.0."):
        rest = own.removeprefix("encoder.cross_attentions.0.")
        return f"{encoder_module(model)}/cross_attention/{({**_IN_A_LAYER, **_CROSS_NORMS})[rest]}"
    index, _, rest = own.removeprefix("encoder.self_attentions.0.").partition(".")
    layer = "self_attention" if index == "0" else f"self_attention_{index}"  # Haiku numbers from the second on
    return f"{encoder_module(model)}/{layer}/{({**_IN_A_LAYER, **_SELF_NORMS})[rest]}"
