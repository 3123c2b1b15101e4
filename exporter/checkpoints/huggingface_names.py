# SPDX-License-Identifier: Apache-2.0
"""transformers' names of our parameters, and the few whose layout differs."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_export.exporter.checkpoints.state import Source, Sources

# The last of them are where transformers has the parameter: one level deeper in all models but the language model.
_QUERIES = "output_position_encodings.position_embeddings"
_COMMON = (
    ("encoder.latents", "perceiver.embeddings.latents"),
    ("encoder.cross_attentions.0.", "perceiver.encoder.cross_attention."),
    ("encoder.self_attentions.0.", "perceiver.encoder.self_attends."),
    ("decoder.cross_attention.", "perceiver.decoder.decoder.decoding_cross_attention."),
    ("decoder.output.", "perceiver.decoder.decoder.final_layer."),
    ("decoder.queries.logits.table", f"perceiver.decoder.decoder.{_QUERIES}"),
)
_TEXT = (
    ("inputs.tokens.embedding.", "perceiver.input_preprocessor.embeddings."),
    ("inputs.tokens.positions", "perceiver.input_preprocessor.position_embeddings.weight"),
)
_LANGUAGE_MODEL = (
    ("decoder.cross_attention.", "perceiver.decoder.decoding_cross_attention."),
    ("decoder.queries.logits.table", f"perceiver.decoder.{_QUERIES}"),
    ("decoder.embedding_bias", "embedding_decoder.bias"),
    *_TEXT,
)
_IMAGE = (
    ("inputs.image.positions.table", "perceiver.input_preprocessor.position_embeddings.position_embeddings"),
    ("inputs.image.positions.projection.", "perceiver.input_preprocessor.positions_projection."),
    ("inputs.image.features.conv.", "perceiver.input_preprocessor.convnet.conv."),
    ("inputs.image.features.norm.", "perceiver.input_preprocessor.convnet.batchnorm."),
    ("inputs.image.features.", "perceiver.input_preprocessor.convnet_1x1."),
)
_FLOW = (("inputs.frames.features.", "perceiver.input_preprocessor.conv_after_patches."),)
_VIDEO = (
    ("inputs.label.token", "perceiver.input_preprocessor.mask.label"),
    ("input_paddings.audio", "perceiver.input_preprocessor.padding.audio"),
    ("input_paddings.frames", "perceiver.input_preprocessor.padding.image"),
    ("decoder.paddings.sound", "perceiver.decoder.padding.audio"),
    ("decoder.paddings.video", "perceiver.decoder.padding.image"),
    ("decoder.paddings.label", "perceiver.decoder.padding.label"),
    ("decoder.queries.label.table", f"perceiver.decoder.modalities.label.decoder.{_QUERIES}"),
    ("decoder.heads.sound.", "perceiver.output_postprocessor.modalities.audio.classifier."),
    ("decoder.heads.video.", "perceiver.output_postprocessor.modalities.image.classifier."),
    ("decoder.heads.label.", "perceiver.output_postprocessor.modalities.label.classifier."),
)
# Of the video autoencoder: what training reads and inference does not (the label is always masked, the rest never).
DEAD = (
    "perceiver.input_preprocessor.mask.audio",
    "perceiver.input_preprocessor.mask.image",
    "perceiver.input_preprocessor.padding.label",
)
_OF_TASK = {
    "image-classification": _IMAGE,
    "fill-mask": _LANGUAGE_MODEL,
    "text-classification": _TEXT,
    "optical-flow": _FLOW,
    "video-autoencoding": _VIDEO,
}
_IN_A_LAYER = (
    (".attention.output.", ".attention.output.dense."),
    (".attention.query.", ".attention.self.query."),
    (".attention.key.", ".attention.self.key."),
    (".attention.value.", ".attention.self.value."),
    (".query_norm.", ".attention.self.layernorm1."),
    (".input_norm.", ".attention.self.layernorm2."),
    (".mlp_norm.", ".layernorm."),
    (".norm.", ".attention.self.layernorm1."),
    (".mlp.hidden.", ".mlp.dense1."),
    (".mlp.output.", ".mlp.dense2."),
)


def huggingface_sources(task: str, swap_kernel: bool = False) -> Sources:
    """Where our parameters are in a checkpoint of transformers.

    ``swap_kernel`` undoes what transformers' conversion of DeepMind's weights did to the 7×7 convolution: height and
    width of its kernel are exchanged, and with DeepMind's numerics must not be.
    """
    names = (*_OF_TASK[task], *_COMMON)

    def source(own: str) -> Source:
        ours, theirs = next(pair for pair in names if own.startswith(pair[0]))
        name = theirs + _in_a_layer(own.removeprefix(ours)) if "attention" in ours else theirs + own.removeprefix(ours)
        if own == "inputs.frames.features.weight":
            return Source(name, patches_to_kernel)
        if own == "inputs.image.features.conv.weight" and swap_kernel:
            return Source(name, lambda kernel: kernel.transpose(-1, -2).contiguous())
        return Source(name)

    return source


def patches_to_kernel(weight: Tensor) -> Tensor:
    """A linear layer (E, 54) over 3×3 patches of two RGB frames as a convolution's kernel (E, 6, 3, 3)."""
    return torch.permute(weight.reshape(-1, 2, 3, 3, 3), (0, 1, 4, 2, 3)).flatten(1, 2).contiguous()


def _in_a_layer(rest: str) -> str:
    # With a dot in front the part inside the layer is matched whole: `.norm.` is not `.mlp_norm.`
    rest = "." + rest
    for part, their_part in _IN_A_LAYER:
        if part in rest:
            rest = rest.replace(part, their_part)
            break
    return rest[1:]
