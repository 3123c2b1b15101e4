# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories: config.json, preprocessor_config.json and weights, without transformers.

Covers the seven task classes of transformers 4 and 5. Sizes that their code fixes, and no config has (64 bands, 256
channels, decoder heads), are fixed here too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from perceiver_export.exporter.checkpoints.huggingface_config import (
    ACTIVATIONS,
    TASKS,
    HuggingFaceConfig,
    Labels,
    default_image_size,
    read_config,
)
from perceiver_export.exporter.checkpoints.origins import refuse_other_directories, refuse_other_packages, unwrapped
from perceiver_export.exporter.checkpoints.preprocessor import image_preprocessing, proportions_note, read_preprocessor
from perceiver_export.exporter.checkpoints.tokenizer import FoundTokenizer, find_tokenizer
from perceiver_export.exporter.checkpoints.weights import Source, Sources, load_model_state, read_state_dict
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.model import architectures
from perceiver_export.exporter.model.architectures import Parity, VideoSizes
from perceiver_export.exporter.model.config import AttentionConfig, Features, ImageInput, PerceiverConfig, TokenInput
from perceiver_export.exporter.presets import preprocessing, resized
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError, UsageError

# transformers' names of our parameters; the first match counts. In the language model some are one level higher.
_QUERIES = "output_position_encodings.position_embeddings"
_LANGUAGE_MODEL = (
    ("decoder.cross_attention.", "perceiver.decoder.decoding_cross_attention."),
    ("decoder.queries.logits.table", f"perceiver.decoder.{_QUERIES}"),
)
_NAMES = (
    ("encoder.latents", "perceiver.embeddings.latents"),
    ("encoder.cross_attentions.0.", "perceiver.encoder.cross_attention."),
    ("encoder.self_attentions.0.", "perceiver.encoder.self_attends."),
    ("inputs.tokens.embedding.", "perceiver.input_preprocessor.embeddings."),
    ("inputs.tokens.positions", "perceiver.input_preprocessor.position_embeddings.weight"),
    ("inputs.image.positions.table", "perceiver.input_preprocessor.position_embeddings.position_embeddings"),
    ("inputs.image.positions.projection.", "perceiver.input_preprocessor.positions_projection."),
    ("inputs.image.features.conv.", "perceiver.input_preprocessor.convnet.conv."),
    ("inputs.image.features.norm.", "perceiver.input_preprocessor.convnet.batchnorm."),
    ("inputs.image.features.", "perceiver.input_preprocessor.convnet_1x1."),
    ("inputs.frames.features.", "perceiver.input_preprocessor.conv_after_patches."),
    ("inputs.label.token", "perceiver.input_preprocessor.mask.label"),
    ("input_paddings.audio", "perceiver.input_preprocessor.padding.audio"),
    ("input_paddings.frames", "perceiver.input_preprocessor.padding.image"),
    ("decoder.cross_attention.", "perceiver.decoder.decoder.decoding_cross_attention."),
    ("decoder.output.", "perceiver.decoder.decoder.final_layer."),
    ("decoder.queries.logits.table", f"perceiver.decoder.decoder.{_QUERIES}"),
    ("decoder.queries.label.table", f"perceiver.decoder.modalities.label.decoder.{_QUERIES}"),
    ("decoder.embedding_bias", "embedding_decoder.bias"),
    ("decoder.paddings.sound", "perceiver.decoder.padding.audio"),
    ("decoder.paddings.video", "perceiver.decoder.padding.image"),
    ("decoder.paddings.label", "perceiver.decoder.padding.label"),
    ("decoder.heads.sound.", "perceiver.output_postprocessor.modalities.audio.classifier."),
    ("decoder.heads.video.", "perceiver.output_postprocessor.modalities.image.classifier."),
    ("decoder.heads.label.", "perceiver.output_postprocessor.modalities.label.classifier."),
)
# Video autoencoder parameters that only training reads: at inference the label is always masked, the rest never.
DEAD = (
    "perceiver.input_preprocessor.mask.audio",
    "perceiver.input_preprocessor.mask.image",
    "perceiver.input_preprocessor.padding.label",
)
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

    ``swap_kernel`` exchanges height and width of the 7×7 convolution's kernel. transformers' conversion of DeepMind's
    weights exchanged them, and DeepMind's numerics need the original.
    """
    names = _LANGUAGE_MODEL + _NAMES if task == "fill-mask" else _NAMES

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
    rest = f".{rest}"  # with a dot in front, whole names match: `.norm.` is not in `.mlp_norm.`
    ours, theirs = next(((ours, theirs) for ours, theirs in _IN_A_LAYER if ours in rest), ("", ""))
    return rest.replace(ours, theirs)[1:] if ours else rest[1:]


_FEATURES: dict[str, Features] = {
    "PerceiverForImageClassificationLearned": "conv1x1",
    "PerceiverForImageClassificationFourier": "pixels",
    "PerceiverForImageClassificationConvProcessing": "conv",
}
_LABELLED = ("image-classification", "text-classification", "video-autoencoding")


def load_huggingface(
    directory: Path, parity: Parity = "huggingface", image_shape: tuple[int, int, int] | None = None
) -> LoadedModel:
    """The model of a Hugging Face directory with its weights.

    ``image_shape`` (channels, height, width) is the image that a classifier will see; by default that of
    preprocessor_config.json, else of the learned positions, else 224 × 224. ``parity`` "deepmind" runs the weights,
    which transformers converted from DeepMind's, with DeepMind's numerics.

    Raises CheckpointError (unreadable, or config and weights that differ), UnsupportedModelError, UsageError.
    """
    refuse_other_directories(directory)
    config, processor = read_config(directory), read_preprocessor(directory)
    task = TASKS[config.architecture]
    trained = architecture(config, parity, default_image_size(config, processor))
    sizes = resized(config.architecture, trained, image_shape)
    found = read_state_dict(directory)
    refuse_other_packages(directory, found)
    state, notes = unwrapped(found)
    sources = huggingface_sources(task, swap_kernel=parity == "deepmind")
    model = load_model_state(sizes, state, sources, ignored=DEAD if task == "video-autoencoding" else ())
    text = _text(config, directory, parity)
    labels = config.read_labels() if task in _LABELLED else None
    return LoadedModel(
        model=model,
        config=sizes,
        task=task if text is None or text.steps is not None else "arrays",
        parity=parity,
        source=directory.resolve().name,
        labels=labels.names if labels else (),
        preprocessing=preprocessing(task, sizes, parity, processor, None) if text is None else text.steps,
        split=task == "video-autoencoding",
        notes=(*notes, *_notes(config, processor, trained, sizes, labels), *(text.notes if text else ())),
        files=text.files if text else {},
        output_kinds={"logits": labels.kind} if labels and task != "video-autoencoding" else {},
    )


def architecture(config: HuggingFaceConfig, parity: Parity, image_size: tuple[int, int]) -> PerceiverConfig:
    """Our config of the model that transformers builds, at one image size (height, width)."""
    classifies = TASKS[config.architecture] == "image-classification"
    image = _image_input(config, parity, *image_size) if classifies else None
    try:
        sizes = _architecture(config, parity, image)
    except UsageError as error:  # the sizes are the file's, not the caller's
        raise CheckpointError(f"config.json: {error.message}", error.hint) from error
    gives = sizes.encoder.self_attention.num_v_channels  # in transformers, as many channels as the values have
    if gives != config.d_latents and config.num_self_attends_per_block:
        raise UnsupportedModelError(
            f"config.json: self-attention gives {gives} channels, but d_latents is {config.d_latents}",
            "make both equal: transformers cannot run such a model either",
        )
    return sizes


def _architecture(config: HuggingFaceConfig, parity: Parity, image: ImageInput | None) -> PerceiverConfig:
    task = TASKS[config.architecture]
    if image is not None:
        sizes = architectures.image_classifier(image, config.encoder, len(config.read_labels().names), parity)
    elif task == "optical-flow":
        sizes = architectures.optical_flow(*config.train_size, config.encoder, parity)
    elif task == "video-autoencoding":
        sizes = architectures.video_autoencoder(_video_sizes(config), config.encoder, parity)
    else:
        tokens = TokenInput(config.vocab_size, config.max_position_embeddings, config.d_model)
        if task == "text-classification":
            count = len(config.read_labels().names)
            sizes = architectures.classifier({"tokens": tokens}, config.encoder, count, parity)
        else:  # transformers fixes these widths in its class
            decoder = AttentionConfig(8, 8 * 32, config.d_model, query_residual=False)
            sizes = architectures.language_model(tokens, config.encoder, decoder, parity)
    activation = ACTIVATIONS[config.hidden_act]
    return sizes if activation == "gelu" else msgspec.structs.replace(sizes, activation=activation)


def _image_input(config: HuggingFaceConfig, parity: Parity, height: int, width: int) -> ImageInput:
    features = _FEATURES[config.architecture]
    side = {"conv1x1": config.image_size, "conv": 56, "pixels": 224}[features]
    return architectures.image_input(features, height, width, parity, (side, side))


def _video_sizes(config: HuggingFaceConfig) -> VideoSizes:
    _, num_frames, height, width = config.output_shape
    if num_frames != config.num_frames:
        raise CheckpointError(
            f"config.json: output_shape has {num_frames} frames, but num_frames is {config.num_frames}",
            "make both equal: a model that returns more or fewer frames than it reads is not supported",
        )
    return VideoSizes(
        num_frames=num_frames,
        height=height,
        width=width,
        num_samples=num_frames * config.audio_samples_per_frame,
        num_labels=len(config.read_labels().names),
        samples_per_patch=config.samples_per_patch,
        image_resolution=(config.image_size, config.image_size),
        num_label_query_channels=config.label_query_channels,
        num_output_channels=config.output_num_channels,
    )


def _text(config: HuggingFaceConfig, directory: Path, parity: Parity) -> FoundTokenizer | None:
    """The tokenizer of a text model; None for other models. DeepMind's code adds no special tokens to the bytes."""
    task = TASKS[config.architecture]
    if task not in ("fill-mask", "text-classification"):
        return None
    found = find_tokenizer(directory, task, config.max_position_embeddings, config.vocab_size)
    if parity == "deepmind" and found.steps is not None:
        return dataclasses.replace(found, steps=msgspec.structs.replace(found.steps, special_tokens=False))
    return found


def _notes(
    config: HuggingFaceConfig,
    processor: dict[str, Any],
    trained: PerceiverConfig,
    sizes: PerceiverConfig,
    labels: Labels | None,
) -> tuple[str, ...]:
    """The assumptions that were made where the checkpoint says nothing."""
    notes = list(labels.notes) if labels else []
    if config.auto_map:
        notes.append(f"config.json names custom code (auto_map): transformers' {config.architecture} is used instead")
    if "audio" in sizes.inputs:
        notes.append(
            "config.json has no sampling rate: give sound at the rate used in training"
            " (DeepMind's released model: 48 kHz)"
        )
    image, usual = sizes.inputs.get("image"), trained.inputs.get("image")
    if isinstance(image, ImageInput) and isinstance(usual, ImageInput):
        if note := proportions_note(image_preprocessing(processor, image.height, image.width)):
            notes.append(note)
        if not processor:
            notes.append(
                f"no preprocessor_config.json: images are cropped, resized to {image.height} × {image.width} and"
                " normalized as for ImageNet; a model that was trained differently will give wrong answers"
            )
        if image != usual:
            notes.append(
                f"images are {image.height} × {image.width}, but the checkpoint's are {usual.height} × {usual.width}:"
                " measure the accuracy at this size with `validate`"
            )
    return tuple(notes)
