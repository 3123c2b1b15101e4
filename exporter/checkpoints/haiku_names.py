# SPDX-License-Identifier: Apache-2.0
"""Haiku's names of our parameters in DeepMind's six released models, their layouts, and the sizes in their shapes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perceiver_export.exporter.checkpoints.huggingface import patches_to_kernel
from perceiver_export.exporter.checkpoints.weights import Source, Sources
from perceiver_export.exporter.model.config import AttentionConfig
from perceiver_export.runtimes.errors import CheckpointError

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
            return Source(f"{DOWNSAMPLE_NORM}/{_BATCH_NORM[kind]}", torch.flatten)
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
    """The ``names`` that inference does not read: tokens that are never used, and batch norm's own counts."""
    return frozenset(name for name in names if name in _DEAD or name.rpartition("/")[2] in ("hidden", "counter"))


def released_model(names: Iterable[str]) -> HaikuModel | None:
    """The released model that has parameters of such names, or None."""
    names = list(names)
    return next((model for part, model in _TELLING if any(part in name for name in names)), None)


def encoder_module(model: HaikuModel) -> str:
    """The module that holds the encoder's."""
    return "encoder/~" if model == "video-autoencoding" else "perceiver_encoder/~"


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


def _module(model: HaikuModel, own: str) -> str:
    """Haiku's module for a linear layer or a LayerNorm of ours."""
    encoder = encoder_module(model)
    if own == "inputs.frames.features":
        return PATCHES_LINEAR
    if own == "decoder.output":
        return f"{_DECODERS[model]}/output"
    if own in _LINEAR:
        return _LINEAR[own]
    for prefix, place in (("decoder.cross_attention.", _DECODERS[model]), ("encoder.cross_attentions.0.", encoder)):
        if own.startswith(prefix):
            return f"{place}/cross_attention/{({**_IN_A_LAYER, **_CROSS_NORMS})[own.removeprefix(prefix)]}"
    index, _, rest = own.removeprefix("encoder.self_attentions.0.").partition(".")
    layer = "self_attention" if index == "0" else f"self_attention_{index}"  # Haiku numbers from the second on
    return f"{encoder}/{layer}/{({**_IN_A_LAYER, **_SELF_NORMS})[rest]}"


_NOT_OF_ONE_MODEL = (
    "the checkpoint is of another model, its parameters were renamed,"
    " or it was trained with other sizes: say them in --config FILE.json"
)


@dataclass(frozen=True)
class Shapes:
    """Shapes by name, and the sizes that follow from them. Everything here raises CheckpointError where they do not
    fit together.
    """

    model: HaikuModel
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def cross(self) -> str:
        """The encoder's cross-attention."""
        return f"{encoder_module(self.model)}/cross_attention"

    @property
    def self_attention(self) -> str:
        """The first of a block's self-attentions."""
        return f"{encoder_module(self.model)}/self_attention"

    @property
    def decoder(self) -> str:
        """The decoder's cross-attention."""
        return f"{_DECODERS[self.model]}/cross_attention"

    @property
    def output(self) -> str:
        """The decoder's last layer."""
        return f"{_DECODERS[self.model]}/output"

    @property
    def num_input_channels(self) -> int:
        return self.of(f"{self.cross}/attention/linear_1/w", 2)[0]

    @property
    def num_query_channels(self) -> int:
        return self.of(f"{self.decoder}/attention/linear/w", 2)[0]

    @property
    def num_self_attentions(self) -> int:
        """How many layers a block has; all blocks share them."""
        layer = re.compile(re.escape(self.self_attention) + r"(_\d+)?/")
        return len({found.group() for name in self.shapes if (found := layer.match(name))})

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of one parameter, which has so many axes."""
        if name not in self.shapes:
            near = difflib.get_close_matches(name, self.shapes, n=1, cutoff=0.8)
            raise CheckpointError(
                f"the checkpoint has no parameter {name!r}" + (f" (nearest: {near[0]})" if near else ""),
                _NOT_OF_ONE_MODEL,
            )
        shape = self.shapes[name]
        if len(shape) != rank or 0 in shape:
            raise CheckpointError(f"parameter {name!r} has shape {shape}, not {rank} axes", _NOT_OF_ONE_MODEL)
        return shape

    def attention(self, module: str, num_heads: int, flag: str) -> AttentionConfig:
        """Widths of one layer; ``flag`` is what the config calls its number of heads."""
        num_qk_channels, num_v_channels = (
            self.of(f"{module}/attention/{linear}/w", 2)[1] for linear in ("linear", "linear_2")
        )
        for width in (num_qk_channels, num_v_channels):
            if width % num_heads:
                raise CheckpointError(
                    f"the {width} channels of {module!r} cannot be split into {num_heads} heads",
                    f"set {flag} of the config to what the model was trained with",
                )
        num_channels, hidden = self.of(f"{module}/mlp/linear/w", 2)
        return AttentionConfig(num_heads, num_qk_channels, num_v_channels, max(1, hidden // num_channels))

    def bands(self, width: int, num_features: int, axes: int, padding: str = "") -> int:
        """How many Fourier bands there are in rows of ``width`` channels: features, positions, padding.

        ``padding`` is our name of its trained vector. Positions of A axes and K bands have A·(2K+1) channels.
        """
        padded = self._padding(padding) if padding else 0
        channels = width - padded - num_features
        bands, rest = divmod(channels - axes, 2 * axes)
        if rest or bands < 1:
            beside = f"{num_features} of features" + (f" and {padded} of padding" if padded else "")
            raise CheckpointError(
                f"{width} channels less {beside} leave {channels} for Fourier positions on {axes} axes,"
                f" which have {axes} + {2 * axes} a band",
                _NOT_OF_ONE_MODEL,
            )
        return bands

    def spatial_patch(self, num_bands: int) -> int:
        """The side of a patch of a video's frames, whose positions have so many bands."""
        values = self.num_input_channels - self._padding("input_paddings.frames") - 3 * (2 * num_bands + 1)
        side = math.isqrt(max(values, 0) // 3)
        if side < 1 or 3 * side**2 != values:
            raise CheckpointError(
                f"a patch of a frame has {values} values beside positions of {num_bands} bands, which is no square of"
                " RGB pixels",
                "if the encoder has other bands than the decoder, set spatial_patch in --config FILE.json;"
                " else the checkpoint is of another model",
            )
        return side

    def _padding(self, own: str) -> int:
        return self.of(haiku_sources(self.model)(own).name, 2)[1]
