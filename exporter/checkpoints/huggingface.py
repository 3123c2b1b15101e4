# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories: config.json, preprocessor_config.json and weights, without transformers.

Covers the seven task classes of transformers 4 and 5. What their code fixes and no config says (64 bands, 256
channels, decoder heads) is fixed here too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from perceiver_export.exporter.checkpoints.huggingface_config import (
    TASKS,
    HuggingFaceConfig,
    default_image_shape,
    read_config,
    read_preprocessor,
    square,
)
from perceiver_export.exporter.checkpoints.huggingface_names import DEAD, huggingface_sources
from perceiver_export.exporter.checkpoints.preprocessor import image_preprocessing
from perceiver_export.exporter.checkpoints.state import load_model_state
from perceiver_export.exporter.checkpoints.tensors import read_state_dict
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.perceiver import architectures
from perceiver_export.exporter.perceiver.architectures import Parity, VideoSizes
from perceiver_export.exporter.perceiver.checks import check_config
from perceiver_export.exporter.perceiver.config import AttentionConfig, ImageInput, PerceiverConfig, TokenInput
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError, UsageError
from perceiver_export.runtimes.preprocessing import (
    FlowPreprocessing,
    Preprocessing,
    TextPreprocessing,
    VideoPreprocessing,
)

_FEATURES: dict[str, Literal["conv1x1", "pixels", "conv"]] = {
    "PerceiverForImageClassificationLearned": "conv1x1",
    "PerceiverForImageClassificationFourier": "pixels",
    "PerceiverForImageClassificationConvProcessing": "conv",
}
_RGB = 3


def load_huggingface(
    directory: Path, parity: Parity = "huggingface", image_shape: tuple[int, int, int] | None = None
) -> LoadedModel:
    """The model of a Hugging Face directory with its weights.

    ``image_shape`` (channels, height, width) is the picture that an image classifier will see; by default what
    preprocessor_config.json says, else what the weights were trained for (224 × 224 where nothing tells). With
    ``parity`` "deepmind" the weights, which transformers converted from DeepMind's, are run with DeepMind's numerics.

    Raises CheckpointError (unreadable, or config and weights that differ), UnsupportedModelError, UsageError.
    """
    config = read_config(directory)
    task = TASKS[config.architecture]
    if image_shape is not None and task != "image-classification":
        raise UsageError(f"the input sizes of {config.architecture} are fixed by its weights", "leave --shape out")
    state = read_state_dict(directory)
    sizes = architecture(config, parity, image_shape or default_image_shape(config, directory))
    sources = huggingface_sources(task, swap_kernel=parity == "deepmind")
    model = load_model_state(sizes, state, sources, ignored=DEAD if task == "video-autoencoding" else ())
    has_labels = task in ("image-classification", "text-classification", "video-autoencoding")
    return LoadedModel(
        model=model,
        config=sizes,
        task=task,
        parity=parity,
        source=directory.resolve().name,
        labels=config.labels if has_labels else (),
        preprocessing=_preprocessing(config, directory, sizes, parity),
        split=task == "video-autoencoding",
        notes=_notes(config, directory, sizes) if has_labels else (),
    )


def architecture(config: HuggingFaceConfig, parity: Parity, image_shape: tuple[int, int, int]) -> PerceiverConfig:
    """Our config of what transformers builds from theirs, at one picture size."""
    sizes = _architecture(config, parity, image_shape)
    if sizes.num_input_channels != config.d_model:
        raise CheckpointError(
            f"d_model is {config.d_model}, {config.architecture} reads {sizes.num_input_channels} channels",
            f"set d_model to {sizes.num_input_channels}, or `architectures` to the class that was trained",
        )
    _check_residual(sizes)
    try:
        check_config(sizes)
    except UsageError as error:  # sizes that are not the caller's, but the file's
        raise CheckpointError(f"config.json: {error.message}", error.hint) from error
    return sizes


def _architecture(config: HuggingFaceConfig, parity: Parity, image_shape: tuple[int, int, int]) -> PerceiverConfig:
    task = TASKS[config.architecture]
    if task == "image-classification":
        image = _image_input(config, parity, image_shape)
        sizes = architectures.image_classifier(image, config.encoder, len(config.labels), parity)
    elif task == "optical-flow":
        sizes = architectures.optical_flow(*config.train_size, config.encoder, parity)
    elif task == "video-autoencoding":
        sizes = architectures.video_autoencoder(_video_sizes(config), config.encoder, parity)
    else:
        tokens = TokenInput(config.vocab_size, config.max_position_embeddings, config.d_model)
        if task == "text-classification":
            sizes = architectures.text_classifier(tokens, config.encoder, len(config.labels), parity)
        else:  # transformers fixes these widths in its class
            decoder = AttentionConfig(8, 8 * 32, config.d_model, query_residual=False)
            sizes = architectures.language_model(tokens, config.encoder, decoder, parity)
    if config.hidden_act != "gelu":
        sizes = msgspec.structs.replace(sizes, activation="gelu-tanh")
    return sizes


def _image_input(config: HuggingFaceConfig, parity: Parity, image_shape: tuple[int, int, int]) -> ImageInput:
    features = _FEATURES[config.architecture]
    channels, height, width = image_shape
    if channels != _RGB:
        raise CheckpointError(
            f"the picture has {channels} channels, the checkpoint reads {_RGB}", "give --shape image=3xHxW"
        )
    side = {"conv1x1": square(config.image_size), "conv": 56, "pixels": 224}[features]
    return architectures.image_input(features, height, width, parity, (side, side))


def _video_sizes(config: HuggingFaceConfig) -> VideoSizes:
    _, num_frames, height, width = config.output_shape
    if num_frames != config.num_frames:
        raise CheckpointError(
            f"config.json: output_shape has {num_frames} frames, num_frames is {config.num_frames}", "make them one"
        )
    return VideoSizes(
        num_frames=num_frames,
        height=height,
        width=width,
        num_samples=num_frames * config.audio_samples_per_frame,
        num_labels=len(config.labels),
        samples_per_patch=config.samples_per_patch,
        image_resolution=(square(config.image_size), square(config.image_size)),
        num_output_channels=config.output_num_channels,
    )


def _preprocessing(config: HuggingFaceConfig, directory: Path, sizes: PerceiverConfig, parity: Parity) -> Preprocessing:
    task = TASKS[config.architecture]
    if task == "image-classification":
        image = sizes.inputs["image"]
        assert isinstance(image, ImageInput)
        steps = image_preprocessing(read_preprocessor(directory), image.height, image.width)
        return msgspec.structs.replace(steps, resample="opencv-bicubic") if parity == "deepmind" else steps
    if task == "optical-flow":
        return FlowPreprocessing.of_tile(*config.train_size)
    if task == "video-autoencoding":
        video = _video_sizes(config)
        return VideoPreprocessing(video.num_frames, video.height, video.width, video.num_samples, sample_rate=48_000)
    return TextPreprocessing(config.max_position_embeddings, special_tokens=parity == "huggingface")


def _notes(config: HuggingFaceConfig, directory: Path, sizes: PerceiverConfig) -> tuple[str, ...]:
    """What the checkpoint did not say, and what was taken instead."""
    notes = []
    image = sizes.inputs.get("image")
    if isinstance(image, ImageInput):
        if not read_preprocessor(directory):
            notes.append(
                f"no preprocessor_config.json: pictures of {image.height} × {image.width}, cropped and normalised as"
                " for ImageNet, are assumed; a model trained otherwise will be wrong"
            )
        usual = default_image_shape(config, directory)
        if (image.height, image.width) != usual[1:]:
            notes.append(
                f"pictures of {image.height} × {image.width}, where the checkpoint says {usual[1]} × {usual[2]}:"
                " its accuracy there is another; measure it with `validate`"
            )
    if all(label == f"LABEL_{index}" for index, label in enumerate(config.labels)):
        notes.append("config.json names no labels: they are LABEL_0, LABEL_1, …")
    return tuple(notes)


def _check_residual(sizes: PerceiverConfig) -> None:
    """The residual adds to the latents what self-attention gives: in transformers as many channels as values have."""
    gives, takes = sizes.encoder.self_attention.num_v_channels, sizes.encoder.num_latent_channels
    if gives != takes:
        raise UnsupportedModelError(
            f"config.json: self-attention gives {gives} channels, d_latents is {takes}",
            "transformers cannot run such a model either",
        )
