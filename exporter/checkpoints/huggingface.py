# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories: config.json, preprocessor_config.json and weights, without transformers.

Covers `PerceiverForImageClassificationLearned`, `…Fourier` and `…ConvProcessing` of transformers 4 and 5. What their
code fixes and no config says (64 bands, 256 channels, decoder heads) is fixed here too.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from perceiver_export.exporter.checkpoints.preprocessor import picture_sides
from perceiver_export.exporter.checkpoints.state import check_state, load_state
from perceiver_export.exporter.checkpoints.tensors import read_state_dict
from perceiver_export.exporter.perceiver.config import (
    DecoderConfig,
    EncoderConfig,
    FourierPositions,
    ImageInput,
    LearnedPositions,
    PerceiverConfig,
)
from perceiver_export.exporter.perceiver.model import PerceiverIO
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError

ARCHITECTURES = {
    "PerceiverForImageClassificationLearned": "conv1x1",
    "PerceiverForImageClassificationFourier": "pixels",
    "PerceiverForImageClassificationConvProcessing": "conv",
}
_OTHER_PERCEIVERS = (
    "PerceiverForMaskedLM",
    "PerceiverForSequenceClassification",
    "PerceiverForOpticalFlow",
    "PerceiverForMultimodalAutoencoding",
    "PerceiverModel",
)
_RGB = 3
_T = TypeVar("_T")
_BANDS = 64
_MOST = 1 << 20  # of any size in a config: more than any Perceiver has, less than what memory is asked for in vain


class HuggingFaceConfig(msgspec.Struct):
    """The part of config.json that says sizes; names and defaults are transformers' `PerceiverConfig`."""

    model_type: str = ""
    architectures: list[str] | None = None
    num_latents: int = 256
    d_latents: int = 1280
    d_model: int = 768
    num_blocks: int = 1
    num_self_attends_per_block: int = 26
    num_self_attention_heads: int = 8
    num_cross_attention_heads: int = 8
    qk_channels: int | None = None
    v_channels: int | None = None
    cross_attention_shape_for_attention: str = "kv"
    self_attention_widening_factor: int = 1
    cross_attention_widening_factor: int = 1
    hidden_act: str = "gelu"
    use_query_residual: bool = True
    image_size: int | list[int] = 56
    id2label: dict[int, str] | None = None
    num_labels: int | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in order; LABEL_i where the config has none, two of them where it does not even count."""
        if self.id2label is not None:
            return tuple(self.id2label[key] for key in sorted(self.id2label))
        return tuple(f"LABEL_{i}" for i in range(self.num_labels or 2))


def load_huggingface(
    directory: Path, image_shape: tuple[int, int, int] | None = None
) -> tuple[PerceiverIO, tuple[str, ...]]:
    """The model of a Hugging Face directory with its weights, in evaluation mode, and its labels.

    ``image_shape`` (channels, height, width) is the picture that the model will see; by default what
    preprocessor_config.json says, else what the weights were trained for (224 × 224 where nothing tells).

    Raises CheckpointError (unreadable, or config and weights that differ) and UnsupportedModelError.
    """
    config = read_config(directory)
    state = read_state_dict(directory)
    sizes = architecture(config, image_shape or default_image_shape(config, directory))
    with torch.device("meta"):  # nothing is allocated until names and shapes are known to fit
        check_state(PerceiverIO(sizes), state, huggingface_name)
    model = PerceiverIO(sizes)
    load_state(model, state, huggingface_name)
    return model.eval(), config.labels


def read_config(directory: Path) -> HuggingFaceConfig:
    """config.json of a supported Perceiver. Raises CheckpointError and UnsupportedModelError."""
    path = directory / "config.json"
    config = _decode(path, HuggingFaceConfig)
    if config.model_type != "perceiver":
        raise UnsupportedModelError(
            f"{path} is of a {config.model_type or 'unnamed'!r} model, not of a Perceiver",
            'a Perceiver\'s config.json says "model_type": "perceiver"',
        )
    name = (config.architectures or ["PerceiverModel"])[0]
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        raise UnsupportedModelError(
            f"{path} names the architecture {name!r}, which cannot be exported"
            + (" yet" if name in _OTHER_PERCEIVERS else ""),
            f"did you mean {near[0]}?" if near else f"supported: {', '.join(ARCHITECTURES)}",
        )
    _check_values(path, config)
    return config


def read_preprocessor(directory: Path) -> dict[str, Any]:
    """preprocessor_config.json, or an empty dict where there is none."""
    path = directory / "preprocessor_config.json"
    return _decode(path, dict[str, Any]) if path.is_file() else {}


def default_image_shape(config: HuggingFaceConfig, directory: Path) -> tuple[int, int, int]:
    """(channels, height, width) as the image processor makes them, else as the learned positions have them."""
    size = read_preprocessor(directory).get("size")
    by_sides = isinstance(size, dict) and all(isinstance(size.get(side), int) for side in ("height", "width"))
    if isinstance(size, int) or by_sides:
        return _RGB, *picture_sides(size, default=224)
    if ARCHITECTURES[_architecture_name(config)] == "conv1x1":
        return _RGB, _square(config.image_size), _square(config.image_size)
    return _RGB, 224, 224


def architecture(config: HuggingFaceConfig, image_shape: tuple[int, int, int]) -> PerceiverConfig:
    """Our config of what transformers builds from theirs, at one picture size."""
    image = _image_input(config, image_shape)
    if image.num_input_channels != config.d_model:
        raise CheckpointError(
            f"d_model is {config.d_model}, {_architecture_name(config)} reads {image.num_input_channels} channels",
            f"set d_model to {image.num_input_channels}, or `architectures` to the class that was trained",
        )
    _check_heads(config, image.num_input_channels)
    return PerceiverConfig(
        input=image,
        encoder=EncoderConfig(
            num_latents=config.num_latents,
            num_latent_channels=config.d_latents,
            num_blocks=config.num_blocks,
            num_self_attentions_per_block=config.num_self_attends_per_block,
            num_cross_attention_heads=config.num_cross_attention_heads,
            num_self_attention_heads=config.num_self_attention_heads,
            num_qk_channels=config.qk_channels,
            num_v_channels=config.v_channels,
            cross_attention_width="q" if config.cross_attention_shape_for_attention == "q" else "kv",
            cross_attention_widening_factor=config.cross_attention_widening_factor,
            self_attention_widening_factor=config.self_attention_widening_factor,
            query_residual=config.use_query_residual,
        ),
        decoder=DecoderConfig(
            num_queries=1,
            num_query_channels=config.d_latents,
            num_output_channels=len(config.labels),
            cross_attention_width="q" if config.cross_attention_shape_for_attention == "q" else "kv",
        ),
        activation="gelu" if config.hidden_act == "gelu" else "gelu-tanh",
    )


def _image_input(config: HuggingFaceConfig, image_shape: tuple[int, int, int]) -> ImageInput:
    features = ARCHITECTURES[_architecture_name(config)]
    channels, height, width = image_shape
    if channels != _RGB:
        raise CheckpointError(
            f"the picture has {channels} channels, the checkpoint reads {_RGB}", "give --shape image=3xHxW"
        )
    if features == "conv1x1":
        side = _square(config.image_size)
        return ImageInput(_RGB, height, width, "conv1x1", 256, LearnedPositions((side, side), 256, 256))
    if features == "conv":
        return ImageInput(_RGB, height, width, "conv", 64, FourierPositions(_BANDS, (56, 56), "float32"))
    return ImageInput(_RGB, height, width, "pixels", _RGB, FourierPositions(_BANDS, (224, 224), "float32"))


# Our names, part by part, and transformers'. Order matters: a longer name comes before its prefix.
_NAMES = (
    ("encoder.latents", "perceiver.embeddings.latents"),
    ("encoder.cross_attention.", "perceiver.encoder.cross_attention."),
    ("encoder.self_attentions.", "perceiver.encoder.self_attends."),
    ("decoder.queries", "perceiver.decoder.decoder.output_position_encodings.position_embeddings"),
    ("decoder.cross_attention.", "perceiver.decoder.decoder.decoding_cross_attention."),
    ("decoder.output.", "perceiver.decoder.decoder.final_layer."),
    ("input_adapter.positions.table", "perceiver.input_preprocessor.position_embeddings.position_embeddings"),
    ("input_adapter.positions.projection.", "perceiver.input_preprocessor.positions_projection."),
    ("input_adapter.features.conv.", "perceiver.input_preprocessor.convnet.conv."),
    ("input_adapter.features.norm.", "perceiver.input_preprocessor.convnet.batchnorm."),
    ("input_adapter.features.", "perceiver.input_preprocessor.convnet_1x1."),
)
_LAYER_NAMES = (
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


def huggingface_name(name: str) -> str:
    """transformers' name of one of our parameters."""
    own, theirs = next(pair for pair in _NAMES if name.startswith(pair[0]))
    rest = name.removeprefix(own)
    if "attention" in own:
        # With a dot in front the part inside the layer is matched whole: `.norm.` is not `.mlp_norm.`
        rest = "." + rest
        for part, their_part in _LAYER_NAMES:
            if part in rest:
                rest = rest.replace(part, their_part)
                break
        rest = rest[1:]
    return theirs + rest


def _architecture_name(config: HuggingFaceConfig) -> str:
    return (config.architectures or [""])[0]


def _square(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]


def _check_values(path: Path, config: HuggingFaceConfig) -> None:
    if config.hidden_act not in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        raise UnsupportedModelError(f"{path}: hidden_act is {config.hidden_act!r}", "Perceivers use gelu")
    if config.cross_attention_shape_for_attention not in ("q", "kv"):
        raise CheckpointError(
            f"{path}: cross_attention_shape_for_attention is {config.cross_attention_shape_for_attention!r}",
            "it is 'q' or 'kv'",
        )
    sizes = ("num_latents", "d_latents", "d_model", "num_blocks", "num_self_attends_per_block")
    heads = ("num_self_attention_heads", "num_cross_attention_heads")
    for name in (*sizes, *heads, "self_attention_widening_factor", "cross_attention_widening_factor"):
        if not 1 <= getattr(config, name) <= _MOST:
            raise CheckpointError(f"{path}: {name} is {getattr(config, name)}", f"sizes are from 1 to {_MOST}")


def _check_heads(config: HuggingFaceConfig, num_input_channels: int) -> None:
    cross = num_input_channels if config.cross_attention_shape_for_attention == "kv" else config.d_latents
    cross_qk, self_qk = config.qk_channels or cross, config.qk_channels or config.d_latents
    for where, heads, channels in (
        ("cross-attention", config.num_cross_attention_heads, (cross_qk, config.v_channels or cross_qk)),
        ("self-attention", config.num_self_attention_heads, (self_qk, config.v_channels or self_qk)),
    ):
        for width in channels:
            if width < 1 or width % heads:
                raise CheckpointError(
                    f"config.json: {width} {where} channels cannot be split into {heads} heads",
                    "heads must divide qk_channels and v_channels",
                )
    # The residual adds what attention gives to the latents.
    gives = config.v_channels or self_qk
    if gives != config.d_latents:
        raise UnsupportedModelError(
            f"config.json: self-attention gives {gives} channels, d_latents is {config.d_latents}",
            "transformers cannot run such a model either",
        )


def _decode(path: Path, type_: type[_T]) -> _T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist", "give a Hugging Face directory: config.json and weights"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "copy the checkpoint again") from error
