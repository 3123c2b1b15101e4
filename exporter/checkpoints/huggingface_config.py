# SPDX-License-Identifier: Apache-2.0
"""config.json and preprocessor_config.json of a Hugging Face directory.

docs/guides/checkpoints.md says how each field is treated. `read_labels` derives the names and kinds of outputs from
id2label, num_labels and problem_type, as transformers does.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from perceiver_export.exporter.checkpoints.preprocessor import image_shape
from perceiver_export.exporter.checkpoints.weights import convert, read_object
from perceiver_export.exporter.model.architectures import EncoderSizes
from perceiver_export.exporter.model.config import Activation
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError
from perceiver_export.runtimes.manifest import OutputKind

_MOST = 1 << 20
LabelName = str | int | float | bool | None


@dataclass(frozen=True)
class Labels:
    """``names`` has one entry per output; ``notes`` are about names that are missing or contradict each other."""

    names: tuple[str, ...]
    kind: OutputKind
    notes: tuple[str, ...] = ()


def read_labels(
    id2label: Mapping[str, LabelName] | None, num_labels: int | None, problem_type: str | None, where: str
) -> Labels:
    """Output i is called id2label[i], else LABEL_i.

    As in transformers 5 there are ``num_labels`` outputs, else as many as id2label names, else two. If both are given
    and differ, id2label is ignored. The kind of the scores follows the rules of transformers' pipelines.

    Raises CheckpointError: keys that are not indices, no labels, or a single one where labels exclude each other.
    """
    try:
        named = {int(key): name for key, name in (id2label or {}).items()}
    except ValueError as error:
        raise CheckpointError(
            f"{where}: a key of id2label is not an index: {str(error)[:200]}", 'write "0", "1", …'
        ) from error
    count = num_labels if num_labels is not None else 2 if id2label is None else len(named)
    if not 1 <= count <= _MOST:
        raise CheckpointError(f"{where}: id2label names {count} labels", "name each output, or leave id2label out")
    if problem_type == "single_label_classification" and count == 1:  # transformers refuses it too
        raise CheckpointError(
            f"{where}: problem_type is {problem_type!r} and there is 1 label, whose softmax is always 100 %",
            "give problem_type regression, or multi_label_classification for a sigmoid",
        )
    notes = []
    if id2label is not None and len(named) != count:
        notes.append(f"{where}: id2label names {len(named)} labels, but num_labels is {count}: no label is named")
        named = {}
    names = tuple(str(named[i]) if named.get(i) is not None else f"LABEL_{i}" for i in range(count))
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        notes.append(f"{where} names no labels: they are LABEL_0, LABEL_1, …")
    elif gaps := [names[i] for i in range(count) if named.get(i) is None]:
        outside = [f"{i} ({name})" for i, name in sorted(named.items()) if not 0 <= i < count]
        notes.append(
            f"{where}: id2label has no name for {_listed(gaps)}" + (f", but names {_listed(outside)}" * bool(outside))
        )
    return Labels(names, _kind(problem_type, count), tuple(notes))


def _kind(problem_type: str | None, count: int) -> OutputKind:
    if problem_type == "regression":
        return "regression"
    return "multi-label" if problem_type == "multi_label_classification" or count == 1 else "single-label"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


TASKS = {
    "PerceiverForImageClassificationLearned": "image-classification",
    "PerceiverForImageClassificationFourier": "image-classification",
    "PerceiverForImageClassificationConvProcessing": "image-classification",
    "PerceiverForMaskedLM": "fill-mask",
    "PerceiverForSequenceClassification": "text-classification",
    "PerceiverForOpticalFlow": "optical-flow",
    "PerceiverForMultimodalAutoencoding": "video-autoencoding",
}


def _classes(*tasks: str) -> tuple[str, ...]:
    return tuple(name for name, task in TASKS.items() if task in tasks)


_TEXT = _classes("fill-mask", "text-classification")
_VIDEO = _classes("video-autoencoding")
_CLASSIFIERS = _classes("image-classification", "text-classification")
_LABELLED = _CLASSIFIERS + _VIDEO

# transformers' names of activation functions. Some differ only in rounding.
_NAMES: dict[Activation, str] = {
    "gelu": "gelu gelu_python",
    "gelu-tanh": "gelu_new gelu_fast gelu_accurate gelu_pytorch_tanh gelu_python_tanh",
    "gelu-clipped": "gelu_10",
    "quick-gelu": "quick_gelu",
    "relu": "relu",
    "relu-squared": "relu2",
    "relu6": "relu6",
    "leaky-relu": "leaky_relu",
    "silu": "silu swish",
    "hardswish": "hardswish",
    "mish": "mish",
    "sqrt-softplus": "sqrtsoftplus",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "laplace": "laplace",
    "linear": "linear",
}
ACTIVATIONS = {theirs: ours for ours, names in _NAMES.items() for theirs in names.split()}
_TRAINED_ACTIVATIONS = ("prelu", "xielu")

_Size = Annotated[int, Meta(ge=1, le=_MOST)]
_OWN_MODEL = (
    "add --use-transformers to load the class with your installed transformers; or export module:function, a function"
    " that returns (model, {'name of an argument': example tensor})"
)


# Fields that only some classes read. The other classes ignore them, as in transformers.
_READ_BY = {
    **dict.fromkeys(("d_model", "vocab_size", "max_position_embeddings"), _TEXT),
    "image_size": ("PerceiverForImageClassificationLearned", *_VIDEO),
    "train_size": _classes("optical-flow"),
    **dict.fromkeys(("num_frames", "audio_samples_per_frame", "samples_per_patch", "output_shape"), _VIDEO),
    **dict.fromkeys(("output_num_channels", "_label_trainable_num_channels"), _VIDEO),
    **dict.fromkeys(("num_labels", "id2label"), _LABELLED),
    "problem_type": _CLASSIFIERS,
}


class HuggingFaceConfig(msgspec.Struct):
    """The fields of config.json that are read, with the names, types and defaults of transformers' `PerceiverConfig`.

    docs/guides/checkpoints.md says how each is treated, and which others are ignored.
    """

    model_type: str = ""
    architectures: list[str] | None = None
    num_latents: _Size = 256
    d_latents: _Size = 1280
    d_model: _Size = 768
    num_blocks: _Size = 1
    num_self_attends_per_block: Annotated[int, Meta(ge=0, le=_MOST)] = 26
    num_self_attention_heads: _Size = 8
    num_cross_attention_heads: _Size = 8
    qk_channels: _Size | None = None
    v_channels: _Size | None = None
    cross_attention_shape_for_attention: str = "kv"
    self_attention_widening_factor: _Size = 1
    cross_attention_widening_factor: _Size = 1
    hidden_act: str = "gelu"
    use_query_residual: bool = True
    vocab_size: _Size = 262
    max_position_embeddings: _Size = 2048
    image_size: Annotated[int, Meta(ge=1, le=2048)] = 56  # side of the grid of positions: the table has side² rows
    train_size: tuple[_Size, _Size] = (368, 496)
    num_frames: _Size = 16
    audio_samples_per_frame: _Size = 1920
    samples_per_patch: _Size = 16
    output_shape: tuple[int, _Size, _Size, _Size] = (1, 16, 224, 224)
    output_num_channels: _Size = 512
    label_query_channels: _Size = msgspec.field(default=1024, name="_label_trainable_num_channels")
    num_labels: _Size | None = None
    id2label: dict[str, LabelName] | None = None
    problem_type: str | None = None
    auto_map: Any = None
    quantization_config: Any = None
    per_layer_config: Any = None

    @property
    def architecture(self) -> str:
        """The class that was trained."""
        return (self.architectures or [""])[0]

    def read_labels(self) -> Labels:
        """Names and kind of the outputs. Raises CheckpointError."""
        return read_labels(self.id2label, self.num_labels, self.problem_type, "config.json")

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


def read_by() -> dict[str, tuple[str, ...]]:
    """The classes that read each field of `HuggingFaceConfig`, by its name in config.json."""
    names = (field.encode_name for field in msgspec.structs.fields(HuggingFaceConfig))
    return {name: _READ_BY.get(name, tuple(TASKS)) for name in names}


def read_config(directory: Path) -> HuggingFaceConfig:
    """config.json of a supported Perceiver. Raises CheckpointError and UnsupportedModelError."""
    path = directory / "config.json"
    values = read_object(path, "a Hugging Face directory: config.json and weights")
    head = {field: value for field, value in values.items() if field in ("model_type", "architectures")}
    name = _check_class(path, convert(head, HuggingFaceConfig, str(path)))
    classes = read_by()
    read = {field: value for field, value in values.items() if name in classes.get(field, ())}
    config = convert(read, HuggingFaceConfig, str(path))
    _check_values(path, config)
    return config


def default_image_size(config: HuggingFaceConfig, processor: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the image processor, else of the learned positions."""
    learned = config.architecture == "PerceiverForImageClassificationLearned"
    return image_shape(processor) or ((config.image_size, config.image_size) if learned else (224, 224))


def _check_class(path: Path, config: HuggingFaceConfig) -> str:
    if config.model_type != "perceiver":
        raise UnsupportedModelError(
            f"{path} describes a {config.model_type or 'unnamed'!r} model, not a Perceiver",
            "add --use-transformers to load it with your installed transformers",
        )
    name = config.architecture
    if not name:
        raise UnsupportedModelError(
            f"{path} does not name its class", f"set `architectures` to the class that was trained: {', '.join(TASKS)}"
        )
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.95)  # a typo, not another class
        raise UnsupportedModelError(
            f"{path} names the class {name!r}, not one of the {len(TASKS)} that can be exported",
            f"did you mean {near[0]}?" if near else _OWN_MODEL,
        )
    return name


def _check_values(path: Path, config: HuggingFaceConfig) -> None:
    if config.hidden_act in _TRAINED_ACTIVATIONS:
        raise UnsupportedModelError(
            f"{path}: hidden_act is {config.hidden_act!r}, which has trained parameters", _OWN_MODEL
        )
    if config.hidden_act not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: hidden_act is {config.hidden_act!r}, which is not an activation of transformers",
            f"give one of {', '.join(ACTIVATIONS)}",
        )
    shape = config.cross_attention_shape_for_attention
    unread = config.architecture == "PerceiverForMaskedLM" and config.qk_channels is not None
    if shape not in ("q", "kv") and not unread:
        raise CheckpointError(f"{path}: cross_attention_shape_for_attention is {shape!r}", "give 'q' or 'kv'")
    if config.quantization_config:
        raise UnsupportedModelError(
            f"{path} has a quantization_config: its weights are quantized",
            "export the original model, or load this one in transformers and call dequantize() and save_pretrained();"
            " `quantize` then makes an int8 bundle",
        )
    if config.per_layer_config:
        raise UnsupportedModelError(f"{path} has a per_layer_config", _OWN_MODEL)
