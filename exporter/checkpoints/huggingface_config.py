# SPDX-License-Identifier: Apache-2.0
"""config.json and preprocessor_config.json of a Hugging Face directory."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from perceiver_export.exporter.checkpoints.preprocessor import picture_sides
from perceiver_export.exporter.perceiver.architectures import EncoderSizes
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError

TASKS = {
    "PerceiverForImageClassificationLearned": "image-classification",
    "PerceiverForImageClassificationFourier": "image-classification",
    "PerceiverForImageClassificationConvProcessing": "image-classification",
    "PerceiverForMaskedLM": "fill-mask",
    "PerceiverForSequenceClassification": "text-classification",
    "PerceiverForOpticalFlow": "optical-flow",
    "PerceiverForMultimodalAutoencoding": "video-autoencoding",
}
_RGB = 3
_T = TypeVar("_T")
_MOST = 1 << 20  # of any size in a config: more than any Perceiver has, less than what memory is asked for in vain
_MOST_SIDE = 2048  # of a square of positions: its table is the square of it
# Numbers, None, or several numbers: each is from 1 to _MOST.
_SIZES = (
    *("num_latents", "d_latents", "d_model", "num_blocks", "num_self_attends_per_block", "qk_channels", "v_channels"),
    *("num_self_attention_heads", "num_cross_attention_heads"),
    *("self_attention_widening_factor", "cross_attention_widening_factor"),
    *("vocab_size", "max_position_embeddings", "image_size", "train_size", "num_labels"),
    *("num_frames", "audio_samples_per_frame", "samples_per_patch", "output_shape", "output_num_channels"),
)


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
    vocab_size: int = 262
    max_position_embeddings: int = 2048
    image_size: int | list[int] = 56
    train_size: tuple[int, int] = (368, 496)
    num_frames: int = 16
    audio_samples_per_frame: int = 1920
    samples_per_patch: int = 16
    output_shape: tuple[int, int, int, int] = (1, 16, 224, 224)
    output_num_channels: int = 512
    id2label: dict[int, str] | None = None
    num_labels: int | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in order; LABEL_i where the config has none, two of them where it does not even count."""
        if self.id2label is not None:
            return tuple(self.id2label[key] for key in sorted(self.id2label))
        return tuple(f"LABEL_{i}" for i in range(self.num_labels or 2))

    @property
    def architecture(self) -> str:
        """The class that was trained."""
        return (self.architectures or ["PerceiverModel"])[0]

    @property
    def encoder(self) -> EncoderSizes:
        """The encoder's sizes."""
        return EncoderSizes(
            num_latents=self.num_latents,
            num_latent_channels=self.d_latents,
            num_self_attentions_per_block=self.num_self_attends_per_block,
            num_blocks=self.num_blocks,
            num_cross_attention_heads=self.num_cross_attention_heads,
            num_self_attention_heads=self.num_self_attention_heads,
            num_qk_channels=self.qk_channels,
            num_v_channels=self.v_channels,
            cross_attention_widening_factor=self.cross_attention_widening_factor,
            self_attention_widening_factor=self.self_attention_widening_factor,
            query_residual=self.use_query_residual,
            width="q" if self.cross_attention_shape_for_attention == "q" else "kv",
        )


def read_config(directory: Path) -> HuggingFaceConfig:
    """config.json of a supported Perceiver. Raises CheckpointError and UnsupportedModelError."""
    path = directory / "config.json"
    config = _decode(path, HuggingFaceConfig)
    if config.model_type != "perceiver":
        raise UnsupportedModelError(
            f"{path} is of a {config.model_type or 'unnamed'!r} model, not of a Perceiver",
            'a Perceiver\'s config.json says "model_type": "perceiver"',
        )
    name = config.architecture
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.8)
        raise UnsupportedModelError(
            f"{path} names the architecture {name!r}, which cannot be exported",
            f"did you mean {near[0]}?" if near else f"supported: {', '.join(TASKS)}",
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
    if config.architecture == "PerceiverForImageClassificationLearned":
        return _RGB, square(config.image_size), square(config.image_size)
    return _RGB, 224, 224


def square(size: int | list[int]) -> int:
    """The side of a square that a config gives as a number or as two."""
    return size if isinstance(size, int) else size[0]


def _check_values(path: Path, config: HuggingFaceConfig) -> None:
    if config.hidden_act not in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        raise UnsupportedModelError(f"{path}: hidden_act is {config.hidden_act!r}", "Perceivers use gelu")
    if config.cross_attention_shape_for_attention not in ("q", "kv"):
        raise CheckpointError(
            f"{path}: cross_attention_shape_for_attention is {config.cross_attention_shape_for_attention!r}",
            "it is 'q' or 'kv'",
        )
    for name in _SIZES:
        value = getattr(config, name)
        for size in value if isinstance(value, list | tuple) else (value,):
            if size is not None and not 1 <= size <= _MOST:
                raise CheckpointError(f"{path}: {name} is {value}", f"sizes are from 1 to {_MOST}")
    if config.id2label == {}:
        raise CheckpointError(f"{path}: id2label names no labels", "leave it out, or name each class")
    sides = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    if len(sides) != 2 or sides[0] != sides[1] or sides[0] > _MOST_SIDE:
        raise CheckpointError(
            f"{path}: image_size is {config.image_size}", f"it is the side of a square, from 1 to {_MOST_SIDE}"
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
