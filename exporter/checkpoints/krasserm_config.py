# SPDX-License-Identifier: Apache-2.0
"""config.json of krasserm/perceiver-io: four of its models as our configs.

Names and defaults of all fields are those of perceiver-io 0.7 to 0.11; what only training reads is allowed and ignored.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import msgspec

from perceiver_export.exporter.checkpoints.json_config import decode_json, read_bytes
from perceiver_export.exporter.checkpoints.preprocessor import MAX_SIDE
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]


class _Layers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What encoders and decoders both have."""

    num_cross_attention_heads: _Count = 8
    num_cross_attention_qk_channels: _Count | None = None
    num_cross_attention_v_channels: _Count | None = None
    cross_attention_widening_factor: _Count = 1
    dropout: float = 0.0
    init_scale: float = 0.02
    freeze: bool = False


class Encoder(_Layers, frozen=True):
    """An encoder without its input."""

    num_cross_attention_layers: _Count = 1
    first_cross_attention_layer_shared: bool = False
    num_self_attention_heads: _Count = 8
    num_self_attention_qk_channels: _Count | None = None
    num_self_attention_v_channels: _Count | None = None
    num_self_attention_layers_per_block: _Count = 8
    num_self_attention_blocks: _Count = 1
    first_self_attention_block_shared: bool = True
    self_attention_widening_factor: _Count = 1


class ImageEncoder(Encoder, frozen=True):
    """``image_shape`` is (height, width, channels)."""

    image_shape: tuple[_Side, _Side, _Count] = (224, 224, 3)
    num_frequency_bands: _Count = 32


class TextEncoder(Encoder, frozen=True):
    """``params`` is where training started from."""

    vocab_size: _Count = 10003
    max_seq_len: _Count = 256
    num_input_channels: _Count = 64
    params: str | None = None


class FlowEncoder(Encoder, frozen=True):
    """``image_shape`` (height, width) is that of a tile."""

    image_shape: tuple[_Side, _Side] = (368, 496)
    num_patch_input_channels: _Count = 27
    num_patch_hidden_channels: _Count = 64
    num_frequency_bands: _Count = 64


class Decoder(_Layers, frozen=True):
    """A decoder without its output."""

    cross_attention_residual: bool = True


class ClassDecoder(Decoder, frozen=True):
    """Pictures and texts to classes."""

    num_output_queries: _Count = 1
    num_output_query_channels: _Count = 256
    num_classes: _Count = 100


class TextDecoder(Decoder, frozen=True):
    """Without ``num_output_query_channels`` the token embedding is the last layer."""

    num_output_query_channels: _Count | None = None
    vocab_size: _Count = 10003
    max_seq_len: _Count = 512


class FlowDecoder(Decoder, frozen=True):
    """The network's output is divided by ``rescale_factor``."""

    image_shape: tuple[_Side, _Side] = (368, 496)
    rescale_factor: _Positive = 100.0


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``model_config`` without encoder and decoder."""

    num_latents: _Count
    num_latent_channels: _Count
    activation_checkpointing: bool = False
    activation_offloading: bool = False
    params: str | None = None


class ImageClassifier(Model, frozen=True, kw_only=True):
    """Pictures to classes."""

    encoder: ImageEncoder
    decoder: ClassDecoder


class MaskedLanguageModel(Model, frozen=True, kw_only=True):
    """Masked texts to tokens."""

    encoder: TextEncoder
    decoder: TextDecoder


class TextClassifier(Model, frozen=True, kw_only=True):
    """Texts to classes."""

    encoder: TextEncoder
    decoder: ClassDecoder


class OpticalFlow(Model, frozen=True, kw_only=True):
    """Two frames to the displacement of each pixel."""

    encoder: FlowEncoder
    decoder: FlowDecoder


KrassermModel = ImageClassifier | MaskedLanguageModel | TextClassifier | OpticalFlow
_MODELS: dict[str, type[KrassermModel]] = {
    "perceiver-io-image-classifier": ImageClassifier,
    "perceiver-io-masked-language-model": MaskedLanguageModel,
    "perceiver-io-text-classifier": TextClassifier,
    "perceiver-io-optical-flow": OpticalFlow,
}


class KrassermConfig(msgspec.Struct):
    """The part of config.json that counts. ``add_special_tokens`` is ours: whether texts stand in [CLS] and [SEP]."""

    model_type: str = ""
    model_config: msgspec.Raw = msgspec.Raw(b"{}")
    id2label: dict[int, str | int] | None = None
    add_special_tokens: bool = True

    def labels(self, count: int) -> tuple[str, ...]:
        """Class names in order; LABEL_i where there are none for ``count`` classes."""
        named = self.id2label or {}
        if sorted(named) != list(range(count)):  # transformers writes two where nothing is known
            return tuple(f"LABEL_{index}" for index in range(count))
        return tuple(str(named[index]) for index in range(count))


def read_krasserm(path: Path) -> tuple[KrassermConfig, KrassermModel]:
    """config.json of a supported model. Raises CheckpointError, UnsupportedModelError."""
    config = decode_json(read_bytes(path, "the model's config.json"), KrassermConfig, str(path))
    if config.model_type not in _MODELS:
        near = difflib.get_close_matches(config.model_type, _MODELS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"model_type is one of {', '.join(_MODELS)}"
        if config.model_type == "perceiver":
            hint = "it is a model of transformers: give its directory, without krasserm: before it"
        raise UnsupportedModelError(f"{path}: model_type is {config.model_type!r}, which cannot be exported", hint)
    model = decode_json(bytes(config.model_config), _MODELS[config.model_type], f"{path}: model_config")
    _check(path, model)
    return config, model


def _check(path: Path, model: KrassermModel) -> None:
    encoder = model.encoder
    if encoder.num_cross_attention_layers > encoder.num_self_attention_blocks:
        raise CheckpointError(
            f"{path}: {encoder.num_cross_attention_layers} num_cross_attention_layers, "
            f"{encoder.num_self_attention_blocks} num_self_attention_blocks",
            "each layer of cross-attention has a block behind it",
        )
    if isinstance(model, OpticalFlow):
        if model.encoder.num_patch_input_channels != 27:
            raise UnsupportedModelError(
                f"{path}: num_patch_input_channels is {model.encoder.num_patch_input_channels}",
                "27 are supported: 3 × 3 pixels in RGB",
            )
        if model.encoder.image_shape != model.decoder.image_shape:
            raise CheckpointError(
                f"{path}: image_shape is {model.encoder.image_shape} in the encoder, "
                f"{model.decoder.image_shape} in the decoder",
                "make them one",
            )
    if isinstance(model, MaskedLanguageModel) and model.encoder.vocab_size != model.decoder.vocab_size:
        raise CheckpointError(
            f"{path}: vocab_size is {model.encoder.vocab_size} in the encoder, {model.decoder.vocab_size} in the "
            "decoder",
            "make them one",
        )
