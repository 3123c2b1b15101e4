# SPDX-License-Identifier: Apache-2.0
"""Load DeepMind's six released Haiku pickles without jax or Haiku, and without executing anything in them.

A pickle holds parameters only. The sizes come from the released model's preset; a JSON file gives those that differ.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import torch
from torch import Tensor

from perceiver_export.exporter.checkpoints.haiku_pickle import read_haiku
from perceiver_export.exporter.checkpoints.huggingface import patches_to_kernel
from perceiver_export.exporter.checkpoints.weights import Source, Sources, convert, load_model_state, read_object, valid
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.model.architectures import Parity
from perceiver_export.exporter.model.config import PerceiverConfig
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.exporter.presets import PRESETS, described, resized
from perceiver_export.runtimes.errors import CheckpointError, UsageError

HaikuModel = Literal[
    "language", "imagenet-learned", "imagenet-fourier", "imagenet-conv", "optical-flow", "video-autoencoding"
]
# Each model's preset, Haiku's module of its decoder, and a part of a name that occurs in no model above it.
_RELEASED: dict[HaikuModel, tuple[str, str, str]] = {
    "language": ("language-bytes", "basic_decoder", "embedding_decoder/"),
    "optical-flow": ("optical-flow", "flow_decoder/~/basic_decoder", "flow_decoder/"),
    "video-autoencoding": ("video-autoencoding", "multimodal_decoder/~/basic_decoder", "multimodal_"),
    "imagenet-conv": ("imagenet-conv", "classification_decoder/~/basic_decoder", "conv2_d_downsample/"),
    "imagenet-learned": ("imagenet-learned", "classification_decoder/~/basic_decoder", "position_encoding_projector/"),
    "imagenet-fourier": ("imagenet-fourier", "classification_decoder/~/basic_decoder", "classification_decoder/"),
}
# The models by their own names, by those in DeepMind's notebooks, and by task.
_NAMES: dict[str, HaikuModel] = {
    **{model: model for model in _RELEASED},
    "fill-mask": "language",
    "masked-language-modelling": "language",
    "imagenet-learned-position-encoding": "imagenet-learned",
    "imagenet-fourier-position-encoding": "imagenet-fourier",
    "imagenet-conv-preprocessing": "imagenet-conv",
}

_TABLE = "trainable_position_encoding/pos_embs"
_IMAGE = "image_preprocessor/~"
_NETWORK_INPUTS = "image_preprocessor/~_build_network_inputs"
_QUERIES = "multimodal_decoder/~decoder_query"
_DOWNSAMPLE = f"{_IMAGE}/conv2_d_downsample/~"

# Parameters outside linear layers and norms: our names and theirs.
_TABLES = {
    "decoder.embedding_bias": "embedding_decoder/bias",
    "inputs.tokens.embedding.weight": "embed/embeddings",
    "inputs.tokens.positions": _TABLE,
    "inputs.image.positions.table": f"{_NETWORK_INPUTS}/{_TABLE}",
    "inputs.label.token": "multimodal_preprocessor/label_mask_token/pos_embs",
    "input_paddings.audio": "multimodal_preprocessor/audio_padding/pos_embs",
    "input_paddings.frames": "multimodal_preprocessor/image_padding/pos_embs",
    "decoder.paddings.sound": f"{_QUERIES}/audio_padding/pos_embs",
    "decoder.paddings.video": f"{_QUERIES}/image_padding/pos_embs",
    "decoder.paddings.label": f"{_QUERIES}/label_padding/pos_embs",
    "decoder.queries.label.table": f"classification_decoder/~/basic_decoder/~/{_TABLE}",
}
_LINEAR = {
    "inputs.image.positions.projection": f"{_NETWORK_INPUTS}/position_encoding_projector/linear",
    "inputs.frames.features": "image_preprocessor/patches_linear",
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
_IN_A_CROSS_LAYER = {
    **_IN_A_LAYER,
    "query_norm": "layer_norm",
    "input_norm": "layer_norm_1",
    "mlp_norm": "layer_norm_2",
}
_IN_A_SELF_LAYER = {**_IN_A_LAYER, "norm": "layer_norm", "mlp_norm": "layer_norm_1"}
_BATCH_NORM = {
    "weight": "scale",
    "bias": "offset",
    # Inference reads `average`, the debiased mean, which training computes from `hidden`.
    "running_mean": "~/mean_ema/average",
    "running_var": "~/var_ema/average",
}
# Video autoencoder parameters that only training reads: at inference the label is always masked, the rest never.
_DEAD = frozenset(
    f"multimodal_preprocessor/{name}/pos_embs" for name in ("audio_mask_token", "image_mask_token", "label_padding")
)


def load_haiku(
    spec: str, parity: Parity = "deepmind", config: Path | None = None, image_shape: tuple[int, int, int] | None = None
) -> LoadedModel:
    """The model of a Haiku pickle with its weights. ``spec`` is TASK:FILE, e.g. ``optical-flow:flow.pystate``.

    ``config`` is a JSON file of the sizes that differ from the released model's, nested as ``architecture`` in a
    bundle's manifest. ``image_shape`` (channels, height, width) is the image that a classifier will see. ``parity``
    "huggingface" runs the weights with transformers' numerics.

    Raises CheckpointError (unreadable, or parameters of another model or of other sizes), UsageError.
    """
    model, path = _parse(spec)
    preset = PRESETS[_RELEASED[model][0]]
    trained = preset.build(parity)
    if config is not None:
        trained = _changed(trained, config)
    sizes = resized(f"deepmind:{model}", trained, image_shape)
    state = valid(path, {name: torch.from_numpy(array) for name, array in read_haiku(path).items()})
    found = released_model(state)
    if found is not None and found != model:
        raise CheckpointError(f"{path} holds the model {found}, not {model}", f"give deepmind:{found}:{path}")
    network = load_haiku_state(model, state, sizes, parity)
    loaded = described(preset.task, network, parity, path.name)
    notes = ["Haiku's pickles have no names of labels: they are LABEL_0, LABEL_1, …"] if loaded.labels else []
    if sizes != trained:
        notes.append("the model was trained on images of another size: measure its accuracy with `validate`")
    return dataclasses.replace(loaded, notes=tuple(notes))


def load_haiku_state(
    model: HaikuModel, state: Mapping[str, Tensor], sizes: PerceiverConfig, parity: Parity = "deepmind"
) -> PerceiverIO:
    """The model from parameters and state under Haiku's names. Raises CheckpointError if they do not fit ``sizes``."""
    sources = haiku_sources(model, swap_kernel=parity == "huggingface")
    try:
        return load_model_state(sizes, state, sources, ignored_names(state))
    except CheckpointError as error:
        raise CheckpointError(
            error.message,
            f"give the sizes that differ from preset:{_RELEASED[model][0]}'s: --config FILE.json, nested as"
            ' `architecture` in manifest.json, e.g. {"encoder": {"num_latents": 64}}',
        ) from error


def _parse(spec: str) -> tuple[HaikuModel, Path]:
    name, _, file = spec.partition(":")
    plain = name.lower().replace("_", "-")
    model = _NAMES.get(plain)
    if model is None:
        near = difflib.get_close_matches(plain, _NAMES, n=1)
        tasks = f"give deepmind:TASK:FILE, TASK one of {', '.join(get_args(HaikuModel))}"
        raise UsageError(f"there is no released model {name!r}", (f"did you mean {near[0]}? " if near else "") + tasks)
    if not file:
        raise UsageError("no checkpoint file is given", f"give deepmind:{model}:FILE")
    return model, Path(file)


def _changed(config: PerceiverConfig, path: Path) -> PerceiverConfig:
    """``config`` with the fields of a JSON file; null takes a field's default. Raises CheckpointError."""
    changes = read_object(path, "a JSON file of sizes")
    return convert(_merged(msgspec.to_builtins(config), changes), PerceiverConfig, str(path))


def _merged(old: Any, new: Any) -> Any:
    """JSON merge patch (RFC 7396)."""
    if not isinstance(new, dict):
        return new
    old = old if isinstance(old, dict) else {}
    changed = {name: _merged(old.get(name), value) for name, value in new.items() if value is not None}
    return {name: value for name, value in {**old, **changed}.items() if new.get(name, "") is not None}


def haiku_sources(model: HaikuModel, swap_kernel: bool = False) -> Sources:
    """Where our parameters are in a Haiku checkpoint of ``model``; Haiku's linear layers are (in, out).

    ``swap_kernel`` exchanges height and width of the 7×7 convolution's kernel. transformers' conversion of DeepMind's
    weights does so, and its published checkpoint has them exchanged.
    """
    decoder = _RELEASED[model][1]
    encoder = "encoder/~" if model == "video-autoencoding" else "perceiver_encoder/~"
    tables = {
        **_TABLES,
        "encoder.latents": f"{encoder}/{_TABLE}",
        "decoder.queries.logits.table": f"{decoder}/~/{_TABLE}",
    }
    linear = {
        **_LINEAR,
        "decoder.output": f"{decoder}/output",
        **{f"decoder.cross_attention.{a}": f"{decoder}/cross_attention/{b}" for a, b in _IN_A_CROSS_LAYER.items()},
        **{f"encoder.cross_attentions.0.{a}": f"{encoder}/cross_attention/{b}" for a, b in _IN_A_CROSS_LAYER.items()},
    }

    def source(own: str) -> Source:
        if own in tables:
            return Source(tables[own])
        module, _, kind = own.rpartition(".")
        if module == "inputs.image.features.norm":
            return Source(f"{_DOWNSAMPLE}/batchnorm/{_BATCH_NORM[kind]}", torch.flatten)
        if module == "inputs.image.features.conv":
            return Source(f"{_DOWNSAMPLE}/conv/w", _swapped_kernel if swap_kernel else hwio_to_oihw)
        if module == "inputs.image.features":
            return Source(f"{_IMAGE}/conv2_d/w", hwio_to_oihw) if kind == "weight" else Source(f"{_IMAGE}/conv2_d/b")
        theirs = linear.get(module) or _self_attention(encoder, module)
        if "norm" in theirs.rpartition("/")[2]:
            return Source(f"{theirs}/scale" if kind == "weight" else f"{theirs}/offset")
        if kind == "bias":
            return Source(f"{theirs}/b")
        return Source(f"{theirs}/w", _patches_kernel if module == "inputs.frames.features" else _transposed)

    return source


def _self_attention(encoder: str, own: str) -> str:
    """Haiku's module for a part of a self-attention; Haiku numbers the layers from the second on."""
    index, _, part = own.removeprefix("encoder.self_attentions.0.").partition(".")
    return f"{encoder}/self_attention{'' if index == '0' else f'_{index}'}/{_IN_A_SELF_LAYER[part]}"


def ignored_names(names: Iterable[str]) -> frozenset[str]:
    """The ``names`` that inference does not read: tokens that are never used, and batch norm's own counts."""
    return frozenset(name for name in names if name in _DEAD or name.rpartition("/")[2] in ("hidden", "counter"))


def released_model(names: Iterable[str]) -> HaikuModel | None:
    """The released model whose parameters have such names, or None."""
    names = list(names)
    return next((model for model, (*_, part) in _RELEASED.items() if any(part in name for name in names)), None)


def hwio_to_oihw(kernel: Tensor) -> Tensor:
    """A convolution's kernel, height, width, in, out -> out, in, height, width."""
    return torch.permute(kernel, (3, 2, 0, 1)).contiguous()


def _swapped_kernel(kernel: Tensor) -> Tensor:
    return torch.permute(kernel, (3, 2, 1, 0)).contiguous()


def _transposed(weight: Tensor) -> Tensor:
    return torch.permute(weight, (1, 0)).contiguous()


def _patches_kernel(weight: Tensor) -> Tensor:
    return patches_to_kernel(_transposed(weight))
